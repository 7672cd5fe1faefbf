"""The forms of a pair: plain, one per slice of a fused layer's output, one per group of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sideroad.config import AdapterConfig, Slice
from sideroad.errors import AdapterError
from sideroad.patterns import first_match
from sideroad.weights import require_kind

Blocks = tuple[tuple[int, int], ...]
"""Rows (start, stop) of the output, one for each pair of a layer, in order."""


def slices_of(config: AdapterConfig, path: str) -> tuple[Slice, ...] | None:
    """Return the slices of a layer's output that have pairs of their own; None for a layer with one plain pair."""
    return first_match(config.slices, path, None)


def blocks(slices: Sequence[Slice], out_features: int) -> Blocks:
    """Return the output rows of the slices that have a pair.

    Raises:
        AdapterError: the slices do not make up the output.
    """
    widths = [_width(one, len(slices), out_features) for one in slices]
    if sum(widths) != out_features:
        raise AdapterError(
            f"slices {list(slices)} do not make up an output of {out_features}; give as many true/false as there are "
            "equal parts, or [width, true/false] for each part."
        )
    starts = [sum(widths[:index]) for index in range(len(widths))]
    return tuple(
        (start, start + width)
        for one, start, width in zip(slices, starts, widths, strict=True)
        if (one if isinstance(one, bool) else one[1])
    )


def enabled(slices: Sequence[Slice]) -> int:
    """Return how many slices have a pair."""
    return sum(1 for one in slices if (one if isinstance(one, bool) else one[1]))


def out_of(slices: Sequence[Slice], rows: int) -> int:
    """Return the whole layer's outputs, from the rows of a compact B."""
    if all(isinstance(one, bool) for one in slices):
        return rows // enabled(slices) * len(slices)
    return sum(one[0] for one in slices if not isinstance(one, bool))


def spread(B: Tensor, where: Blocks, out_features: int) -> Tensor:
    """Return a compact B as [out, pairs * rank]: each pair's rows at their place and in columns of their own, else 0.

    Args:
        B: [rows of all blocks, rank].
    """
    widths = [stop - start for start, stop in where]
    square: Tensor = torch.block_diag(*torch.split(B, widths))  # type: ignore[no-untyped-call]
    edges = [0, *(edge for block in where for edge in block), out_features]
    gaps = [edges[index + 1] - edges[index] for index in range(0, len(edges), 2)]
    pieces = [square.new_zeros(gaps[0], square.shape[1])]
    for piece, gap in zip(torch.split(square, widths), gaps[1:], strict=True):
        pieces += [piece, square.new_zeros(gap, square.shape[1])]
    return torch.cat(pieces)


def compact(B: Tensor, where: Blocks) -> Tensor | None:
    """Undo `spread`; None where B has values outside the blocks, or is no matrix."""
    if B.ndim != 2:
        return None
    rank = B.shape[1] // len(where)
    parts = [B[start:stop, index * rank : (index + 1) * rank] for index, (start, stop) in enumerate(where)]
    small = torch.cat(parts)
    return small.contiguous() if torch.equal(spread(small, where, B.shape[0]), B) else None


def matrices(A: Tensor, B: Tensor, where: Blocks | None = None, out_features: int = 0) -> tuple[Tensor, Tensor]:
    """Return a pair of any form as A [total rank, in] and B [out, total rank] with the same product.

    Args:
        where: blocks of a sliced layer; a convolution's groups are seen by the shapes.
    """
    A, B = A.flatten(1), B.flatten(1)
    if where is not None:
        return A, spread(B, where, out_features)
    groups = A.shape[0] // max(B.shape[1], 1)
    if groups > 1 and A.shape[0] == groups * B.shape[1] and B.shape[0] % groups == 0:
        rows = B.shape[0] // groups
        return A, spread(B, tuple((index * rows, (index + 1) * rows) for index in range(groups)), B.shape[0])
    return A, B


def pair_shapes(
    config: AdapterConfig, path: str, layer: nn.Module, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B for one layer, as they are stored and saved.

    Args:
        rank: of each of the layer's pairs.
    Raises:
        TargetError: no pair can act on the layer.
        AdapterError: slices that do not make up the layer's output.
    """
    A, B = require_kind(layer).pair_shapes(layer, rank)
    parts = slices_of(config, path)
    if parts is None:
        return A, B
    where = blocks(parts, B[0])
    return (len(where) * rank, *A[1:]), (sum(stop - start for start, stop in where), rank)


def _width(one: Slice, count: int, out_features: int) -> int:
    """Width of one slice; of an output that does not divide evenly, 0, so that the sum is wrong."""
    if not isinstance(one, bool):
        return one[0]
    return out_features // count if out_features % count == 0 else 0
