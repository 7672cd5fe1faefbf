"""A gated feed-forward block with low-rank pairs: `down(act(gate(x)) · up(x))`, as one differentiable function.

With e = gate(x), g = up(x), h = act(e) · g, the backward pass keeps x (or what it is made from), e, g and the pairs' P,
and makes h again in the same elementwise pass as the gradients of e and g. Plain autograd keeps act(e) and h as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.kernels.pieces import Activation, Pieces
from sideroad.kernels.products import (
    Projection,
    Shape,
    backward_products,
    flatten,
    forward_products,
    layers_of,
    reshaped,
    shapes_of,
)
from sideroad.kernels.projections import load, pairs_wanted, save, spread
from sideroad.kernels.remade import Source, source_of


def gated_mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: Activation, pieces: Pieces
) -> Tensor:
    """Return down(act(gate(x)) · up(x)).

    Args:
        x: [..., in].
        gate: [width, in], `up` likewise; `down` is [out, width].
    """
    layers: Sequence[Projection] = (gate, up, down)
    y: Tensor = _GatedMlp.apply(  # type: ignore[no-untyped-call]
        x, source_of(x), activation, pieces, shapes_of(layers), *flatten(layers)
    )
    return y


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Source | None,
        activation: Activation,
        pieces: Pieces,
        shapes: tuple[Shape | None, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        """Keep e, g and each P, besides x or what it is made from."""
        flat = x.reshape(-1, x.shape[-1])
        *entry, down = layers_of(tensors, shapes, x.dtype)
        (e, g), kept = forward_products(flat, entry)
        (y,), last = forward_products(pieces.gate(e, g, activation), [down])
        ctx.activation, ctx.pieces, ctx.shapes, ctx.shape = activation, pieces, shapes, x.shape
        save(ctx, pairs_wanted(ctx, first=5, count=len(tensors)), flat, source, [*kept, *last], tensors, (e, g))
        return reshaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, tensors, (e, g) = load(ctx)
        *entry, down = layers_of(tensors, ctx.shapes, e.dtype)
        upstream = dy.reshape(-1, dy.shape[-1])
        dh, _ = backward_products(None, [upstream], [down], kept[2:], input=True)
        h, de, dg = ctx.pieces.gate_backward(dh, e, g, ctx.activation)
        _, last = backward_products(None if x is None else h, [upstream], [down], kept[2:], input=False)
        dx, first = backward_products(x, [de, dg], entry, kept[:2], input=ctx.needs_input_grad[0])
        shaped = None if dx is None else dx.view(ctx.shape)
        return (shaped, None, None, None, None, *spread([*first, *last], tensors))
