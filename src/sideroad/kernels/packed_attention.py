"""Attention over a packed row, segment by segment: nothing is computed that a mask would hide.

transformers lets a model's attention be replaced by name. Inside `segment_attention(model)` the model uses ours;
a forward that carries `segments` (see `segment_arguments`) attends within each sequence of its single row, and
every other forward (padding, generation with a cache) goes to the implementation that the model had before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sideroad.kernels.tree_attention import fits, tree_attention
from sideroad.segments import Segments, longest, paths

IMPLEMENTATION = "sideroad_segments"
"""The name under which transformers knows this attention."""

REPLACED = "sdpa"
"""The implementation that ours stands in for, and hands everything else to."""

HALF = (torch.bfloat16, torch.float16)

_ARGUMENT = "segments"
HARMLESS = frozenset({"position_ids", "is_causal", "sliding_window", "use_cache", "output_attentions"})
"""Arguments of an attention that change nothing here, or are looked at apart."""

_in_packed_forward: ContextVar[bool] = ContextVar("_in_packed_forward", default=False)


class UnsupportedAttentionError(ValueError):
    """A layer asks its attention for something that the segmented form does not compute."""


def refusal(model: nn.Module) -> str | None:
    """Say why a model's attention cannot be replaced, judging by its structure alone; None if it can."""
    name = type(model).__name__
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if current == IMPLEMENTATION:
        return None
    if current != REPLACED:
        return f"{name} runs {current!r} attention; only {REPLACED!r} is replaced"
    switchable = getattr(model, "_can_set_attn_implementation", None)
    if not hasattr(model, "set_attn_implementation") or (switchable is not None and not switchable()):
        return f"{name} does not take its attention from transformers' interface"
    return None


def is_installed(model: nn.Module) -> bool:
    """Tell whether `segment_attention` is in force on this model."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == IMPLEMENTATION


@contextmanager
def segment_attention(model: nn.Module) -> Iterator[None]:
    """Make the model use segmented attention until the block ends, however it ends; blocks may nest.

    The block must also hold the backward pass: gradient checkpointing runs the layers again there.

    Raises:
        UnsupportedAttentionError: the model's attention cannot be replaced.
    """
    if is_installed(model):
        yield
        return
    if reason := refusal(model):
        raise UnsupportedAttentionError(reason)
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
    before = _implementations(model.config)
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


@contextmanager
def segment_arguments(segments: Segments) -> Iterator[dict[str, Any]]:
    """Give the extra forward arguments of one packed row; the forward must run inside the block.

    The segments travel as an argument from layer to layer, so that checkpointing repeats them in the backward pass;
    the block itself only keeps transformers from building the [row, row] mask that they replace.

    Args:
        segments: of the row, in order, filling it.
    """
    token = _in_packed_forward.set(True)
    try:
        yield {_ARGUMENT: segments}
    finally:
        _in_packed_forward.reset(token)


def window(model: nn.Module) -> int | None:
    """Return the fewest tokens that any layer looks back over (sliding window or chunk), None where all see all.

    A sequence up to this length is attended in full by every layer; a longer one needs the model's own mask.
    """
    config = getattr(model, "config", None)
    names = ("sliding_window", "attention_chunk_size", "window_size")
    found = [getattr(each, name, None) for each in _with_parts(config) for name in names]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention within each sequence of one packed row.

    Args:
        query: [1, heads, row, width]; `key` and `value` may have fewer heads, each serving an equal group of queries.
        segments: of the row, filling it.
        scale: factor on the products; None means 1/sqrt(width).
    Returns:
        [1, row, heads, width of value], contiguous.
    """
    dtype = value.dtype
    if query.device.type == "cpu":
        # torch's flash backward on CPUs takes four times as long in 16 bits as in fp32 (371 against 91 ms of a step)
        query, key, value = (one.float() if one.dtype in HALF else one for one in (query, key, value))
    if not dropout and fits(query, key, value):
        return tree_attention(query, key, value, segments, scale=scale).to(dtype)
    attend = _attend_paths if any(one.offset for one in segments) else _attend_each
    return attend(query, key, value, segments, scale, dropout).to(dtype)


def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, dropout: float
) -> Tensor:
    """One call of torch's attention for each sequence, for what `tree_attention` does not compute."""
    grouped = query.shape[1] != key.shape[1]
    sizes = [one.stop - one.start for one in segments]
    # split, not slices: its backward is one concatenation instead of a zero-filled row per sequence.
    parts = zip(*(torch.split(whole, sizes, dim=2) for whole in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat([part.transpose(1, 2) for part in attended], dim=1)


def _attend_paths(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, dropout: float
) -> Tensor:
    """Every sequence gathered whole, beginnings repeated, padded on the right; each token's row is taken back."""
    places, owners = (one.to(query.device) for one in paths(segments))
    grouped = query.shape[1] != key.shape[1]
    q, k, v = (whole[0][:, places].transpose(0, 1) for whole in (query, key, value))
    attended = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(0, 1)[owners][None]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    segments = others.pop(_ARGUMENT, None)
    if segments is None:
        replaced = ALL_ATTENTION_FUNCTIONS[REPLACED]
        result: tuple[Tensor, Tensor | None] = replaced(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return result
    if reason := _unsupported(module, query, key, attention_mask, segments, others):
        raise UnsupportedAttentionError(f"{type(module).__name__} {reason}")
    return attend_segments(query, key, value, segments, scale=scaling, dropout=dropout), None


def _unsupported(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    segments: Segments,
    others: Mapping[str, Any],
) -> str | None:
    if attention_mask is not None:
        return "brings a mask of its own"
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "is not causal"
    row, filled = (query.shape[0], query.shape[2], key.shape[2]), segments[-1].stop
    if row != (1, filled, filled):
        return f"has queries and keys {row} where one row of {filled} tokens was expected"
    reach = others.get("sliding_window")
    if reach is not None and longest(segments) > reach:
        return f"looks back over {reach} tokens only, and a sequence has {longest(segments)}"
    if strange := sorted(name for name, given in others.items() if given is not None and name not in HARMLESS):
        return f"passes {', '.join(strange)} to its attention"
    return None


def _mask(*positional: Any, **named: Any) -> Tensor | None:
    if _in_packed_forward.get():
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[REPLACED](*positional, **named)
    return mask


def _with_parts(config: Any) -> Iterator[Any]:
    """A configuration and those of its parts."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        yield from _with_parts(getattr(config, name, None))


def _implementations(config: Any) -> dict[str, Any]:
    """Snapshot of the implementation of a configuration and of its parts, in the form that transformers sets."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    nested = {name: _implementations(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **nested}
