"""Embeddings: a weight [tokens, dim], which is the transpose of the matrix that acts on a one-hot token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sideroad.kinds.kind import Seam, own_weight
from sideroad.kinds.linear import add_product


class Embedding:
    """`nn.Embedding`, seen as [dim, tokens]: A [rank, tokens] is looked up, B [dim, rank] multiplies.

    Also its subclasses that multiply what they look up by their `embed_scale` (Gemma, BART): the branch is multiplied
    too. Others whose forward is their own (positions with an offset) are not claimed, nor those with `max_norm`, which
    rewrite their weight in the forward.
    """

    name: str | None = "embedding"
    weight = "weight"
    bias: str | None = None
    seam: Seam = "hook"
    linear = False

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is a plain or scaled embedding."""
        weight = own_weight(layer)
        if weight is None or not isinstance(layer, nn.Embedding):
            return False
        known = type(layer).forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
        return known and layer.max_norm is None and tuple(weight.shape) == (layer.num_embeddings, layer.embedding_dim)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (dim, tokens)."""
        tokens, dim = layer.get_parameter("weight").shape
        return dim, tokens

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the transpose."""
        return weight.t()

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the transpose."""
        return weight.t()

    def pair_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return [rank, tokens] and [dim, rank]."""
        dim, tokens = self.shape(layer)
        return (rank, tokens), (dim, rank)

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Drop whole tokens: a one-hot input has one element, and the branch is zero without it (PEFT drops none)."""
        kept = (torch.rand(x.shape, device=x.device) >= probability).float()
        return x, (kept / (1 - probability)).unsqueeze(-1)

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Return y + factor · embed_scale · (rows x of Aᵀ) Bᵀ."""
        padding = layer.padding_idx if isinstance(layer, nn.Embedding) else None
        low = functional.embedding(x, A.to(y.dtype).t(), padding_idx=padding)
        # a lookup stays in its own type under autocast, so its branch must too
        with torch.autocast(y.device.type, enabled=False):
            return add_product(y, low * embed_scale(layer, low), B, factor)

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the rows that are looked up."""
        weight = layer.get_parameter("weight")
        return functional.embedding(x, weight) * embed_scale(layer, weight)

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Return the bias itself; an embedding has none, so nothing asks."""
        return bias


def embed_scale(layer: nn.Module, like: Tensor) -> float | Tensor:
    """Return what an embedding's forward multiplies its rows by, in the dtype of `like`; torch's own by nothing."""
    if type(layer).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(layer, "embed_scale", 1.0)
    return scale.to(like) if isinstance(scale, Tensor) else float(scale)
