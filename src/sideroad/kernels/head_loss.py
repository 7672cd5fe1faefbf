"""The output head and the cross-entropy in one function, a few rows at a time: the logits never exist in full.

The gradient is taken in the forward pass, while a chunk's logits are there: a backward pass that made them again would
cost another product with the largest matrix of the model. A frozen head needs no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.kernels.pieces import Pieces
from sideroad.kernels.predictions import Predictions
from sideroad.kernels.products import Layer, Projection, flatten, layers_of, shapes_of

CHUNK_BYTES = 64 * 2**20
"""Memory of one chunk's logits."""

FEWEST_ROWS, MOST_ROWS = 128, 512
"""Fewer rows a chunk are slower (measured), more gain nothing."""


@dataclass(frozen=True)
class Finish:
    """What a model does to its logits: z = cap · tanh(scale · z₀ / cap), or scale · z₀ where cap is None."""

    scale: float = 1.0
    cap: float | None = None


def head_loss(hidden: Tensor, head: Projection, finish: Finish, predictions: Predictions, pieces: Pieces) -> Tensor:
    """Return the summed cross-entropy of the predictions, an fp32 scalar (fp64 for fp64 input).

    Args:
        hidden: [n, width], one row for each place of the predictions.
        head: its weight and bias get no gradient; its pair does. Dropout of the pair must be 0.
    """
    grad = torch.is_grad_enabled() and (hidden.requires_grad or head.pair is not None)
    total: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, finish, predictions, pieces, grad, shapes_of([head]), *flatten([head])
    )
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        finish: Finish,
        predictions: Predictions,
        pieces: Pieces,
        grad: bool,
        shapes: Any,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Take loss and gradients chunk by chunk; only the gradients are kept."""
        (layer,) = layers_of(tensors, shapes, hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        work = _Work(hidden, layer, finish, predictions, pieces, wide)
        total = hidden.new_zeros((), dtype=wide)
        # summed over the chunks, so in the wide type; hidden's rows are each written once
        dtypes = (hidden.dtype, wide, wide)
        gradients = [
            torch.zeros_like(one, dtype=dtype) if grad and one is not None else None
            for one, dtype in zip((hidden, layer.A, layer.B), dtypes, strict=True)
        ]
        for rows in _chunks(len(hidden), layer.weight.shape[0], wide.itemsize):
            total += work.chunk(rows, gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, *tensors[2:])]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            # a scalar of a wider type is not rounded to that of the tensor it multiplies
            None if one is None else (one * upstream).to(dtype)
            for one, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return found[0], None, None, None, None, None, None, None, found[1], found[2]


@dataclass(frozen=True)
class _Work:
    """One call's inputs."""

    hidden: Tensor
    layer: Layer
    finish: Finish
    predictions: Predictions
    pieces: Pieces
    wide: torch.dtype

    def chunk(self, rows: slice, gradients: list[Tensor | None]) -> Tensor:
        """Return the loss of some rows, and add their part to the gradients of hidden, A and B."""
        known, finish = self.predictions, self.finish
        x = self.hidden[rows]
        mine = slice(known.offsets[rows.start], known.offsets[rows.stop])
        owners, targets, counts = known.owners[mine] - rows.start, known.targets[mine], known.counts[rows, None]
        logits, P = self._logits(x)
        z = logits.to(self.wide)
        if finish.scale != 1.0:
            z.mul_(finish.scale)
        if finish.cap is not None:
            z.div_(finish.cap).tanh_().mul_(finish.cap)
        chosen = z[owners, targets].sum()
        slope = None if finish.cap is None or gradients[0] is None else 1 - (z / finish.cap).square_()
        peak, mass = self.pieces.exponentials(z)
        loss = (counts.to(self.wide) * (mass.log() + peak)).sum() - chosen
        if gradients[0] is None:
            return loss
        # exp(z - peak) / mass, not exp(z - logsumexp): rounding the logsumexp would scale a whole row coherently
        z.mul_(counts.to(self.wide) / mass)
        z.index_put_((owners, targets), z.new_full((), -1.0), accumulate=True)
        if slope is not None:
            z.mul_(slope)
        if finish.scale != 1.0:
            z.mul_(finish.scale)
        self._add_gradients(rows, x, z.to(x.dtype), P, gradients)
        return loss

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        layer = self.layer
        logits = torch.mm(x, layer.weight.t()) if layer.bias is None else torch.addmm(layer.bias, x, layer.weight.t())
        if layer.A is None or layer.B is None or layer.shape is None:
            return logits, None
        P = torch.mm(x, layer.A.t())
        return logits.addmm_(P, layer.B.t(), alpha=layer.shape.scale), P

    def _add_gradients(
        self, rows: slice, x: Tensor, dz: Tensor, P: Tensor | None, gradients: list[Tensor | None]
    ) -> None:
        layer, (dx, dA, dB) = self.layer, gradients
        if dx is not None:
            torch.mm(dz, layer.weight, out=dx[rows])
        if P is None or layer.A is None or layer.B is None or layer.shape is None:
            return
        Q = torch.mm(dz, layer.B).mul_(layer.shape.scale)
        if dx is not None:
            dx[rows].addmm_(Q, layer.A)
        if dA is not None and dB is not None:
            dA.add_(torch.mm(Q.t(), x))
            dB.add_(torch.mm(P.t(), dz).t(), alpha=layer.shape.scale)


def _chunks(rows: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    size = min(MOST_ROWS, max(FEWEST_ROWS, CHUNK_BYTES // (vocabulary * itemsize)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
