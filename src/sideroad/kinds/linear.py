"""Linear layers: `nn.Linear`, and the Conv1D of GPT-2, which stores the transpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sideroad.kinds.kind import Seam, own_weight


class Linear:
    """`nn.Linear`: weight [out, in], A [rank, in], B [out, rank].

    Packed and re-parametrised weights are not of the shape that the class promises, so they are not claimed. Nor is
    the output projection inside `nn.MultiheadAttention`, whose forward is never called: it is a kind of its own.
    """

    name: str | None = None
    weight = "weight"
    bias: str | None = "bias"
    seam: Seam = "hook"
    linear = True

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is an `nn.Linear` whose own forward uses its weight."""
        weight = own_weight(layer)
        if weight is None or not isinstance(layer, nn.Linear):
            return False
        plain = not isinstance(layer, NonDynamicallyQuantizableLinear)
        return plain and tuple(weight.shape) == (layer.out_features, layer.in_features)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (out, in)."""
        rows, columns = self.oriented(layer.get_parameter(self.weight)).shape
        return rows, columns

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the weight itself."""
        return weight

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the weight itself."""
        return weight

    def pair_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return [rank, in] and [out, rank]."""
        out_features, in_features = self.shape(layer)
        return (rank, in_features), (out_features, rank)

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Zero single elements of x."""
        return functional.dropout(x, probability), 1.0

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Return y + factor · B A x in one fused product-and-add."""
        return add_product(y, functional.linear(x, A.to(x.dtype)), B, factor)

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return x Wᵀ."""
        return functional.linear(x, self.oriented(layer.get_parameter(self.weight)))

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Return the bias itself: outputs are the last dimension."""
        return bias


class Transposed(Linear):
    """Hugging Face's Conv1D: as `nn.Linear`, but its weight is [in, out]."""

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is a Conv1D; known by structure, so that this file does not import transformers."""
        weight = own_weight(layer)
        named_so = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)
        if not named_so or weight is None:
            return False
        return weight.ndim == 2 and getattr(layer, "nf", None) == weight.shape[1]

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the transpose."""
        return weight.t()

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the transpose."""
        return weight.t()


def add_product(y: Tensor, low: Tensor, B: Tensor, factor: float | Tensor) -> Tensor:
    """Return y + factor · low Bᵀ: a single rounding, and no [..., out] temporary.

    Args:
        y: [..., out].
        low: [..., rank].
        B: [out, rank].
    """
    low = low.to(y.dtype)
    if isinstance(factor, Tensor):
        low, factor = low * factor.to(y.dtype), 1.0
    flat = torch.addmm(
        y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), B.to(y.dtype).t(), alpha=factor
    )  # fmt: skip
    return flat.view(y.shape)
