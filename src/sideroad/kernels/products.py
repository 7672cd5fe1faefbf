"""Products of frozen linear layers with low-rank pairs, forward and backward, several layers on one input.

For a layer with weight W, bias b and a pair of scale s (Hu et al. 2021, arXiv:2106.09685, eq. 3):

    P = drop(x) Aᵀ        y = x Wᵀ + b + s P Bᵀ
    Q = s dy B            dA = Qᵀ drop(x)        dB = s dyᵀ P        dx = Σ dy W + drop'(Q A)

W gets no gradient. Without dropout the A of all layers are stacked: one product gives every P, another every dA, a
third their part of dx. A dropout mask is never kept: the random state before its draw is, and it is drawn again; for
that the input must be contiguous, since masks are drawn in the order of memory.
Plain tensor functions; the autograd functions that use them are in `projections.py` and `gated_mlp.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Pair:
    """A low-rank pair as a product needs it.

    Attributes:
        A: [rank, in], B: [out, rank]; cast to the type of the input where they differ.
        scale: s, with the weight of the adapter folded in.
        dropout: probability of zeroing an element of the branch's input; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer: weight [out, in] (it may be a transposed view), bias [out], and perhaps a pair."""

    weight: Tensor
    bias: Tensor | None
    pair: Pair | None = None


class Shape(NamedTuple):
    """What of a pair is no tensor."""

    scale: float
    dropout: float


class Layer(NamedTuple):
    """One layer inside an autograd function; A, B and shape are None together."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    shape: Shape | None


class Kept(NamedTuple):
    """What a pair keeps of its forward: P [tokens, rank], and the random state before its mask was drawn."""

    P: Tensor | None
    draw: Tensor | None


class PairGradient(NamedTuple):
    """dA and dB; None where there is no pair, or none was asked for."""

    A: Tensor | None
    B: Tensor | None


NOTHING = Kept(None, None)
TENSORS_PER_LAYER = 4


def flatten(projections: Sequence[Projection]) -> list[Tensor | None]:
    """Return weight, bias, A and B of each layer in one row, as an autograd function takes them."""
    pairs = [(None, None) if one.pair is None else (one.pair.A, one.pair.B) for one in projections]
    return [tensor for one, pair in zip(projections, pairs, strict=True) for tensor in (one.weight, one.bias, *pair)]


def shapes_of(projections: Sequence[Projection]) -> tuple[Shape | None, ...]:
    """Return what `flatten` leaves out."""
    return tuple(None if one.pair is None else Shape(one.pair.scale, one.pair.dropout) for one in projections)


def layers_of(tensors: Sequence[Tensor | None], shapes: Sequence[Shape | None], dtype: torch.dtype) -> list[Layer]:
    """Undo `flatten`, with the pairs cast to the type in which the products run."""
    found = []
    for index, shape in enumerate(shapes):
        weight, bias, A, B = tensors[index * TENSORS_PER_LAYER :][:TENSORS_PER_LAYER]
        assert weight is not None, "every layer has a weight"
        found.append(Layer(weight, bias, None if A is None else A.to(dtype), None if B is None else B.to(dtype), shape))
    return found


def forward_products(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Kept]]:
    """Compute y of each layer, [tokens, out], and what its backward pass needs besides x [tokens, in]."""
    outputs = [
        torch.mm(x, one.weight.t()) if one.bias is None else torch.addmm(one.bias, x, one.weight.t()) for one in layers
    ]
    kept = _reduced(x, layers)
    for y, layer, (P, _) in zip(outputs, layers, kept, strict=True):
        if P is not None and layer.B is not None and layer.shape is not None:
            y.addmm_(P, layer.B.t(), alpha=layer.shape.scale)
    return outputs, kept


def backward_products(
    x: Tensor | None, upstream: Sequence[Tensor | None], layers: Sequence[Layer], kept: Sequence[Kept], *, input: bool
) -> tuple[Tensor | None, list[PairGradient]]:
    """Compute the gradients of the input and of each pair.

    Args:
        x: [tokens, in]; None where no gradient of an A is wanted. That of a B needs the P that was kept.
        upstream: dy [tokens, out] of each layer; None where an output has no part in the loss.
        input: whether dx is wanted.
    Returns:
        dx [tokens, in] or None, and the gradients of each layer's pair.
    """
    dx: Tensor | None = None
    gradients = [PairGradient(None, None)] * len(layers)
    stacked: list[tuple[int, Tensor, Tensor]] = []
    for index, (dy, layer, (P, draw)) in enumerate(zip(upstream, layers, kept, strict=True)):
        if dy is None:
            continue
        if input:
            dx = torch.mm(dy, layer.weight) if dx is None else dx.addmm_(dy, layer.weight)
        if layer.A is None or layer.B is None or layer.shape is None:
            continue
        Q = torch.mm(dy, layer.B).mul_(layer.shape.scale)
        # Pᵀ dy, not dyᵀ P: rank rows of the longer dimension take a third of the time
        dB = None if P is None else torch.mm(P.t(), dy).mul_(layer.shape.scale).t()
        gradients[index] = PairGradient(None, dB)
        if draw is None:
            stacked.append((index, Q, layer.A))
            continue
        noise = noise_again(dy, layer.A.shape[1], layer.shape.dropout, draw)
        if x is not None:
            gradients[index] = PairGradient(torch.mm(Q.t(), x * noise), dB)
        if dx is not None:
            dx.add_(torch.mm(Q, layer.A).mul_(noise))
    if stacked:
        dx = _add_stacked(x, dx, stacked, gradients)
    return dx, gradients


def noise_again(like: Tensor, width: int, dropout: float, draw: Tensor) -> Tensor:
    """Return the mask over (1 - dropout), [tokens, width], that was drawn from a random state.

    Args:
        like: [tokens, any], of the type and on the device of the input that was dropped from.
    """
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        if like.is_cuda:
            torch.cuda.set_rng_state(draw, like.device)
        else:
            torch.set_rng_state(draw)
        return functional.dropout(like.new_ones(len(like), width), dropout)


def _add_stacked(
    x: Tensor | None, dx: Tensor | None, stacked: list[tuple[int, Tensor, Tensor]], gradients: list[PairGradient]
) -> Tensor | None:
    """Write dA of the pairs without dropout into `gradients`, and add their part to dx; all in one product each."""
    Q, A = _joined([one for _, one, _ in stacked], 1), _joined([one for _, _, one in stacked], 0)
    if x is not None:
        parts = torch.split(torch.mm(Q.t(), x), [one.shape[1] for _, one, _ in stacked])
        for (index, _, _), dA in zip(stacked, parts, strict=True):
            gradients[index] = gradients[index]._replace(A=dA)
    return None if dx is None else dx.addmm_(Q, A)


def _reduced(x: Tensor, layers: Sequence[Layer]) -> list[Kept]:
    """P of each pair; draws are made in the order of the layers, as the plain path makes them."""
    found = [NOTHING] * len(layers)
    plain = [(index, one.A) for index, one in enumerate(layers) if one.A is not None and not _dropout(one)]
    if plain:
        together = torch.mm(x, _joined([A for _, A in plain], 0).t())
        for (index, _), P in zip(plain, torch.split(together, [len(A) for _, A in plain], dim=1), strict=True):
            found[index] = Kept(P, None)
    for index, layer in enumerate(layers):
        if layer.A is not None and (dropout := _dropout(layer)):
            draw = torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
            found[index] = Kept(torch.mm(functional.dropout(x, dropout), layer.A.t()), draw)
    return found


def dropped(projections: Sequence[Projection]) -> bool:
    """Whether any pair drops from its input now."""
    return any(one.pair is not None and one.pair.dropout > 0 for one in projections)


def reshaped(y: Tensor, like: Tensor) -> Tensor:
    """Return y [tokens, out] in the leading shape of `like`; no view, so that whoever gets it may write into it."""
    shaped: Tensor = torch.ops.aten._unsafe_view(y, (*like.shape[:-1], y.shape[-1]))
    return shaped


def _dropout(layer: Layer) -> float:
    return 0.0 if layer.shape is None else layer.shape.dropout


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
