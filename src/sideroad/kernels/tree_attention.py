"""Causal attention over a packed row in which sequences may share their beginnings, without a hidden product.

Every segment attends to itself, causally, and all tokens that continue a segment attend to it in one call, unmasked;
the parts of a token are put together by their log-sum-exp. So the attention to a shared beginning is shared too, and
nothing is gathered: in a row that lists a tree from its root down, both are slices. Backwards each part gets the whole
output and the whole log-sum-exp, with which the kernel's own formula gives that part of the gradient (as in Ring
Attention, arXiv:2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sideroad.segments import Segments

_LONG = 384
"""Keys from which the kernel's backward pass is faster on repeated key heads than on shared ones: 4 % at 512, 17 % at
1024 tokens (measured), since it divides its work by heads; at 80 tokens it is slower."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel computes these: on a CPU, in fp32 or fp64, values as wide as keys."""
    devices = {query.device.type, key.device.type, value.device.type}
    kinds = {query.dtype, key.dtype, value.dtype}
    right = devices == {"cpu"} and len(kinds) == 1 and kinds <= {torch.float32, torch.float64}
    return right and query.shape[-1] == key.shape[-1] == value.shape[-1]


def tree_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None) -> Tensor:
    """Attend as the segments say.

    Args:
        query: [1, heads, row, width]; `key` and `value` may have fewer heads, each serving an equal group of queries.
        scale: factor on the products; None means 1/sqrt(width).
    Returns:
        [1, row, heads, width], contiguous.
    """
    attended: Tensor = _TreeAttention.apply(query, key, value, segments, scale)  # type: ignore[no-untyped-call]
    return attended


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
    ) -> Tensor:
        """Attend part by part; the whole output and log-sum-exp are kept."""
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        total = query.new_empty(1, query.shape[2], query.shape[1])
        for one in segments:
            own = slice(one.start, one.stop)
            part, weight = _attend(query, key, value, own, own, scale)
            out[:, own], total[:, own] = part, weight
        for one in segments:
            if one.end > one.stop:
                own, below = slice(one.start, one.stop), slice(one.stop, one.end)
                _add_part(out[:, below], total[:, below], *_attend(query, key, value, below, own, scale))
        ctx.segments, ctx.scale = segments, scale
        ctx.save_for_backward(query, key, value, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Give every part the whole output and log-sum-exp, and add up what it returns."""
        query, key, value, out, total = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(one) for one in (query, key, value))
        rows = upstream, out, total

        def part(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            dy, y, weight = (one[:, queries].transpose(1, 2) for one in rows)
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            times = q.shape[1] // k.shape[1] if k.shape[2] >= _LONG else 1
            k, v = (one.repeat_interleave(times, 1) if times > 1 else one for one in (k, v))
            found = _backward(dy, q, k, v, y, weight, 0.0, causal, scale=ctx.scale)
            return found[0], *(one.unflatten(1, (-1, times)).sum(2) if times > 1 else one for one in found[1:])

        for one in ctx.segments:
            own = slice(one.start, one.stop)
            dq[:, :, own], dk[:, :, own], dv[:, :, own] = part(own, own, True)
        for one in ctx.segments:
            if one.end > one.stop:
                own, below = slice(one.start, one.stop), slice(one.stop, one.end)
                for whole, place, piece in zip((dq, dk, dv), (below, own, own), part(below, own, False), strict=True):
                    whole[:, :, place] += piece
        return dq, dk, dv, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, queries: slice, keys: slice, scale: float | None
) -> tuple[Tensor, Tensor]:
    """One part: its output [1, queries, heads, width] and its log-sum-exp [1, queries, heads]; causal on itself."""
    out, total = _forward(
        query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, queries == keys, scale=scale
    )
    return out.transpose(1, 2), total.transpose(1, 2)


def _add_part(out: Tensor, total: Tensor, part: Tensor, weight: Tensor) -> None:
    """Put another part of the same tokens together with what there is, in place."""
    both = torch.logaddexp(total, weight)
    out.mul_((total - both).exp_()[..., None])
    out.addcmul_(part, (weight - both).exp_()[..., None])
    total.copy_(both)
