"""Does a layer with a forward of its own compute what its class promises? Asked of subclasses, with a small input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sideroad.kinds.embedding import embed_scale

PLAIN = (nn.Linear.forward, nn.Embedding.forward)
"""Forwards that need no question."""


def keeps_its_promise(layer: nn.Module) -> bool:
    """Whether a subclass of `nn.Linear` or `nn.Embedding` with a forward of its own is linear in its weight.

    One that normalises its weight, adds something or scales its rows otherwise would be adapted and merged wrongly. A
    layer without data (meta) is believed; so is one whose class cannot be asked here.
    """
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or type(layer).forward in PLAIN or "forward" in layer.__dict__:
        return True
    if not isinstance(layer, nn.Linear | nn.Embedding):
        return True
    # a generator of its own: nobody's random numbers change
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            x = torch.randn(2, layer.in_features, generator=draw).to(weight)
            expected = functional.linear(x, layer.weight, layer.bias)
        else:
            x = torch.arange(min(2, layer.num_embeddings), device=weight.device)
            expected = layer.weight[x] * embed_scale(layer, layer.weight)
        try:
            forward: Any = type(layer).forward
            found = forward(layer, x)
        except Exception:
            return True  # it wants other arguments, which its model knows
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return True
    return torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2 * float(expected.float().abs().max()))
