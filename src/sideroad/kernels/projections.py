"""Linear layers with low-rank pairs that read the same input, as one differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.kernels.products import (
    TENSORS_PER_LAYER,
    Kept,
    PairGradient,
    Projection,
    Shape,
    backward_products,
    flatten,
    forward_products,
    layers_of,
    reshaped,
    shapes_of,
)
from sideroad.kernels.remade import Source, remake, source_of


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Apply frozen layers with their pairs to one input.

    For the backward pass x is kept once for all layers (or what it can be made again from, see `remade.py`), and rank
    numbers per token and pair; nothing at all where no pair is trained.

    Args:
        x: [..., in].
    Returns:
        one [..., out] for each layer.
    """
    outputs: tuple[Tensor, ...] = _Project.apply(  # type: ignore[no-untyped-call]
        x, source_of(x), shapes_of(projections), *flatten(projections)
    )
    return outputs


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Source | None, shapes: tuple[Shape | None, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        outputs, kept = forward_products(flat, layers_of(tensors, shapes, x.dtype))
        ctx.shapes, ctx.shape, ctx.dtype = shapes, x.shape, x.dtype
        save(ctx, pairs_wanted(ctx, first=3, count=len(tensors)), flat, source, kept, tensors)
        ctx.set_materialize_grads(False)
        return tuple(reshaped(y, x) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, kept, tensors, _ = load(ctx)
        layers = layers_of(tensors, ctx.shapes, ctx.dtype)
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in upstream]
        dx, gradients = backward_products(x, flat, layers, kept, input=ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(ctx.shape), None, None, *spread(gradients, tensors))


class Wanted(NamedTuple):
    """Whether any A needs a gradient, for which x is kept, and any B, for which its P is."""

    A: bool
    B: bool


def pairs_wanted(ctx: Any, *, first: int, count: int) -> Wanted:
    """Say what among the flattened tensors, `count` of them from argument `first` on, needs a gradient."""
    needed = ctx.needs_input_grad[first : first + count]
    return Wanted(any(needed[2::TENSORS_PER_LAYER]), any(needed[3::TENSORS_PER_LAYER]))


def save(
    ctx: Any,
    wanted: Wanted,
    x: Tensor,
    source: Source | None,
    kept: Sequence[Kept],
    tensors: Sequence[Tensor | None],
    others: Sequence[Tensor] = (),
) -> None:
    """Keep the tensors of a backward pass through autograd, so that checkpointing and offloading see them.

    Args:
        wanted: of which factors there will be gradients; x is kept for A, and P for B.
        source: what x can be made from again, kept in its place.
        others: whatever else the function needs.
    """
    inputs = () if not wanted.A else (x,) if source is None else source.tensors
    ctx.source = replace(source, tensors=()) if wanted.A and source is not None else None
    ctx.sizes = len(inputs), len(tensors), len(kept)
    ctx.draws = [one.draw for one in kept]
    ctx.save_for_backward(*inputs, *tensors, *(one.P if wanted.B else None for one in kept), *others)


def load(ctx: Any) -> tuple[Tensor | None, list[Kept], Sequence[Tensor | None], Sequence[Tensor]]:
    """Return x (None where no gradient of an A is wanted), what was kept, the flattened tensors, and the others."""
    saved, (inputs, count, pairs) = ctx.saved_tensors, ctx.sizes
    x = saved[0] if inputs else None
    if ctx.source is not None:
        x = remake(replace(ctx.source, tensors=tuple(saved[:inputs])))
    after = inputs + count
    kept = [Kept(P, draw) for P, draw in zip(saved[after : after + pairs], ctx.draws, strict=True)]
    return x, kept, saved[inputs:after], saved[after + pairs :]


def spread(gradients: Sequence[PairGradient], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients in the order of `flatten`, each in its parameter's type; frozen weights and biases have none."""
    found: list[Tensor | None] = []
    for index, gradient in enumerate(gradients):
        pair = tensors[index * TENSORS_PER_LAYER + 2 :][:2]
        found += [None, None]
        found += [None if d is None or one is None else d.to(one.dtype) for d, one in zip(gradient, pair, strict=True)]
    return found
