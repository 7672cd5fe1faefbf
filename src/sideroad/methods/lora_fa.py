"""The LoRA-FA delta: A stays as it starts, B is trained with a corrected gradient."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.methods.lora import LoraDelta, PairOptions

SMALLEST = 1e-6
"""Eigenvalues of A Aᵀ below this share of the largest count as zero, so that dependent rows of A do no harm."""


class LoraFaDelta(LoraDelta):
    """A pair of which only B is trained (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).

    A needs no gradient, so the layer's input is not kept for the backward pass, only A x: rank numbers per token. The
    gradient of B is corrected to g (A Aᵀ)⁻¹ / s², so that a step of gradient descent on B moves W by the projection of
    W's own gradient onto the rows of A (sec. 3.2 of the paper's later version). The correction is linear and A
    never changes, so gradients may be accumulated, and any optimizer may follow.

    Args:
        A: [rank, in]; a buffer, not a parameter.
        B: [out, rank].
    """

    def __init__(self, A: Tensor, B: Tensor, **options: Unpack[PairOptions]) -> None:
        super().__init__(A, B, **options)
        del self.A
        self.register_buffer("A", A)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return A, and B whose gradient will be corrected."""
        if not (torch.is_grad_enabled() and self.B.requires_grad):
            return self.A, self.B
        return self.A, _Corrected.apply(self.B, self._correction())  # type: ignore[no-untyped-call]

    def _correction(self) -> Tensor:
        """Return (A Aᵀ)⁻¹ / s² in fp64; computed again when A or s has changed."""
        now = self.A.device, self.A.data_ptr(), self.A._version, self.scale
        if self._kept is None or self._kept[0] != now:
            self._kept = now, correction(self.A, self.scale)
        return self._kept[1]


@torch.no_grad()
def correction(A: Tensor, scale: float) -> Tensor:
    """Return (A Aᵀ)⁺ / s², [rank, rank] in fp64, by which a gradient of B is multiplied from the right."""
    rows = A.flatten(1).double()
    inverse: Tensor = torch.linalg.pinv(rows @ rows.t(), rtol=SMALLEST, hermitian=True)
    return inverse / scale**2


class _Corrected(torch.autograd.Function):
    """The identity, whose gradient [out, rank, ...] is multiplied by a matrix [rank, rank]."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, correction: Tensor) -> Tensor:
        ctx.save_for_backward(correction)
        return B.view_as(B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (correction,) = ctx.saved_tensors
        flat = upstream.flatten(1) @ correction.to(upstream.dtype)
        return flat.view_as(upstream), None


