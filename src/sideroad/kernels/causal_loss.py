"""The training loss of a causal language model: logits only where a token is to be predicted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sideroad.kernels.cross_entropy import IGNORED, cross_entropy_sum
from sideroad.kernels.packed_attention import is_installed, segment_arguments, window
from sideroad.segments import Segments, apart, longest


def causal_loss(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    targets: Tensor,
    lengths: Sequence[int] | None,
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the predicted tokens, and how many there are.

    The caller alone divides. The output head runs on the positions that some row has a target for, if the model lets
    them be chosen (`logits_to_keep`); soft caps, biases and adapted heads stay right because it is the model's own.

    Args:
        input_ids: [rows, length]; `position_ids` likewise, restarting at 0 with every sequence.
        attention_mask: [rows, length], 1 for real tokens; None for a packed row, or where nothing is padding.
        targets: [rows, length], the token to predict at each position, already shifted; -100 for none.
        lengths: tokens of each sequence of a packed row (rows == 1 and no mask); of no effect otherwise. That the
            model keeps packed sequences apart must have been established: see `isolation.choose_route`.
    Returns:
        the sum (fp32 scalar, differentiable; 0 when nothing is predicted) and the count.
    """
    wanted = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
    segments = None if lengths is None else apart(lengths)
    logits = chosen_logits(model, input_ids, position_ids, attention_mask, segments, wanted)
    kept = targets[:, wanted]
    return cross_entropy_sum(logits.flatten(0, 1), kept.flatten()), int((kept != IGNORED).sum())


def chosen_logits(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None,
    positions: Tensor,
) -> Tensor:
    """Run the model and return its logits at some positions of every row, [rows, n, vocabulary].

    Args:
        positions: [n] ascending; only these are computed where the model lets them be chosen.
    """
    given = (input_ids, position_ids, attention_mask, segments)
    if "logits_to_keep" in _parameters(model):
        return forward_logits(model, *given, positions)
    return forward_logits(model, *given)[:, positions]


def forward_logits(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None,
    positions: Tensor | None = None,
) -> Tensor:
    """Run the model and return its logits, [rows, length or the chosen positions, vocabulary].

    Args:
        positions: [n] indices along the row whose logits to compute; None for all. Needs `logits_to_keep`.
    """
    with forward_arguments(model, input_ids, position_ids, attention_mask, segments) as arguments:
        if positions is not None:
            arguments["logits_to_keep"] = positions
        return _logits(model, arguments)


@contextmanager
def forward_arguments(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None,
) -> Iterator[dict[str, Any]]:
    """Give the arguments of a forward pass, which must run inside the block.

    A packed row goes through segmented attention where that is installed and every sequence fits the layers' windows,
    else through the block mask that transformers derives from the restarting positions.
    """
    known = _parameters(model)
    open_ended = "**" in known
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in known:
        arguments["position_ids"] = position_ids
    if "use_cache" in known or open_ended:
        # With a cache transformers no longer looks for sequence boundaries in the positions.
        arguments["use_cache"] = False
    packed = segments is not None and attention_mask is None and len(input_ids) == 1
    if not (packed and segments and is_installed(model) and longest(segments) <= (window(model) or longest(segments))):
        yield arguments
        return
    with segment_arguments(segments) as extra:
        yield {**arguments, **extra}


def _logits(model: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**arguments).logits
    return logits


def _parameters(model: nn.Module) -> frozenset[str]:
    """Names of the forward's parameters; `**` stands for any others."""
    found = inspect.signature(model.forward).parameters.values()
    return frozenset("**" if each.kind is inspect.Parameter.VAR_KEYWORD else each.name for each in found)
