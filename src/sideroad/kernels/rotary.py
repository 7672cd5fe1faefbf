"""Rotary position embedding, which keeps nothing but its angles for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.kernels.pieces import Pieces


def rotary(x: Tensor, cos: Tensor, sin: Tensor, pieces: Pieces) -> Tensor:
    """Rotate queries or keys; see `pieces.rotate`.

    Args:
        x: [tokens, heads, width].
        cos: [tokens, 1, width], likewise sin; they get no gradient.
    """
    rotated: Tensor = _Rotary.apply(x, cos, sin, pieces)  # type: ignore[no-untyped-call]
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        ctx.save_for_backward(cos, sin)
        return pieces.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.pieces.rotate_backward(dy, cos, sin), None, None, None
