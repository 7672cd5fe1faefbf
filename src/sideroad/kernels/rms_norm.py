"""RMSNorm with a frozen weight: its input is kept for the backward pass, its output never needs to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.kernels.pieces import NormStyle, Pieces
from sideroad.kernels.remade import Source, mark


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle, pieces: Pieces) -> Tensor:
    """Return x / rms(x) · weight over the last dimension; see `pieces.norm`.

    The output carries a note of what it was made from, so that layers which read it need not keep it.

    Args:
        x: [..., width].
        weight: [width]; gets no gradient.
    """
    y, inverse = _RmsNorm.apply(x, weight, eps, style, pieces)  # type: ignore[no-untyped-call]
    flat = x.detach().reshape(-1, x.shape[-1])
    normed: Tensor = mark(y, Source(pieces.scaled, (flat, inverse, weight), (style,)))
    return normed


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle, pieces: Pieces
    ) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        y, inverse = pieces.norm(flat, weight, eps, style)
        ctx.style, ctx.pieces, ctx.shape = style, pieces, x.shape
        ctx.save_for_backward(flat, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        return y.view(x.shape), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        flat, inverse, weight = ctx.saved_tensors
        upstream = dy.reshape(flat.shape)
        dx = ctx.pieces.norm_backward(upstream, flat, inverse, weight, ctx.style)
        return dx.view(ctx.shape), None, None, None, None
