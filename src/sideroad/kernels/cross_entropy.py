"""Cross-entropy of many rows over a large vocabulary, accurate and in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of a row that carries no loss."""

CHUNK_ROWS = 128
"""Rows worked on at a time; fewer are slower (measured), more only cost memory."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over rows of `logsumexp(logits[i]) - logits[i, targets[i]]`.

    The arithmetic is fp32 whatever the logits' type (fp64 for fp64 logits), so that a bf16 model loses nothing here.
    Only the logits themselves are kept for the backward pass, where one gradient of their size is made; neither
    a log-softmax nor an fp32 copy ever exists in full.

    Args:
        logits: [rows, vocabulary].
        targets: [rows], int64; a row with `IGNORED` adds nothing and gets a zero gradient.
    Returns:
        a scalar in the type of the arithmetic; 0 when there is no row to count.
    """
    total: Tensor = _CrossEntropySum.apply(logits, targets)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum in chunks of rows; each row's peak and mass, the sum of exp(z - peak), are kept for `backward`."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        peaks = logits.new_zeros(len(targets), dtype=dtype)
        masses = logits.new_ones(len(targets), dtype=dtype)
        losses = logits.new_zeros(len(targets), dtype=dtype)
        for rows in _chunks(len(targets)):
            part = logits[rows].to(dtype)
            peak = part.amax(dim=-1)
            mass = (part - peak[:, None]).exp_().sum(dim=-1)
            chosen = part.gather(1, targets[rows].clamp_min(0)[:, None])[:, 0]
            peaks[rows], masses[rows] = peak, mass
            losses[rows] = torch.where(targets[rows] == IGNORED, 0, mass.log() + (peak - chosen))
        ctx.save_for_backward(logits, targets, peaks, masses)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, targets, peaks, masses = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        # exp(z - peak) / mass, not exp(z - logsumexp): rounding the logsumexp would scale a whole row coherently.
        factors = torch.where(targets == IGNORED, 0, upstream / masses)
        hits = torch.where(targets == IGNORED, 0, -upstream)
        for rows in _chunks(len(targets)):
            part = (logits[rows].to(peaks.dtype) - peaks[rows, None]).exp_().mul_(factors[rows, None])
            part.scatter_add_(1, targets[rows].clamp_min(0)[:, None], hits[rows, None])
            gradient[rows] = part
        return gradient, None


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS))
