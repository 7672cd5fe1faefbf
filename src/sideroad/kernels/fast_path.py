"""The fast path of training: which modules of a model it takes over, and the block in which it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sideroad.kernels.causal_loss import forward_arguments
from sideroad.kernels.fast_attention import FastAttention, Rotary, match_attention, may_match
from sideroad.kernels.live import projection_of, refusal
from sideroad.kernels.packed_attention import is_installed
from sideroad.kernels.pieces import Pieces
from sideroad.kernels.stand_ins import Family, FastGatedMlp, FastLinear, FastNorm
from sideroad.kernels.standing_in import Forward, standing_in
from sideroad.kernels.structure import Gated, Norm, match_gated, match_norm, siblings
from sideroad.modes import cuda_devices, in_eval_mode
from sideroad.route import deltas_of, walk
from sideroad.segments import apart


@dataclass(frozen=True)
class FastPlan:
    """What of a model goes the fast path, by module path.

    Attributes:
        families: linear layers that read one input, in the order of their calls.
        plain: why an adapted layer computes itself.
    """

    families: tuple[tuple[str, ...], ...]
    gated: Mapping[str, Gated]
    norms: Mapping[str, Norm]
    attentions: Mapping[str, Rotary]
    plain: Mapping[str, str]

    def lines(self) -> list[str]:
        """Say in words what is taken over, and what is not and why; layers with one reason share a line."""
        linear = sum(len(family) for family in self.families)
        adapted = linear + len(self.plain)
        parts = ((self.gated, "feed-forward blocks"), (self.norms, "norms"), (self.attentions, "attentions"))
        besides = ", ".join(f"{len(found)} {name}" for found, name in parts if found)
        lines = [f"fast path: {'all ' if linear == adapted else f'{linear} of '}{adapted} adapted layers"]
        lines[0] += f", {besides}" if besides else ""
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.plain.items():
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            some = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            lines.append(f"computed the usual way: {some}: {reason}")
        return lines


def plan_fast_path(model: nn.Module, arguments: Mapping[str, Any]) -> FastPlan:
    """Find what can be taken over, by structure and by asking the modules themselves.

    Runs the model on a few tokens; mode, gradients and random state stay as they are. Attention is taken over only
    where segmented attention is in force (see `isolation.packing`).

    Args:
        arguments: of a short forward pass: `input_ids`, [1, length].
    """
    modules = dict(walk(model))
    with torch.random.fork_rng(devices=cuda_devices(model)), in_eval_mode(model), torch.no_grad():
        norms = {path: norm for path, module in modules.items() if (norm := match_norm(module)) is not None}
        gated = {path: block for path, module in modules.items() if (block := match_gated(module)) is not None}
        attentions = _match_attentions(model, modules, arguments) if is_installed(model) else {}
        adapted = {path: module for path, module in modules.items() if deltas_of(module) is not None}
        reasons = {path: _reason(module) for path, module in adapted.items()}
        plain = {path: reason for path, reason in reasons.items() if reason is not None}
        ready = {path: module for path, module in adapted.items() if path not in plain}
        families = tuple(siblings(model, ready, dict(arguments)))
    grouped = {path for family in families for path in family}
    plain |= {path: "is called more than once, or not for every token" for path in ready if path not in grouped}
    return FastPlan(families, gated, norms, attentions, plain)


@contextmanager
def fast_path(model: nn.Module, plan: FastPlan, pieces: Pieces) -> Iterator[None]:
    """Let a model compute as planned until the block ends, however it ends; the block must hold the backward pass.

    Adapters may be switched inside; layers whose adapters are not of the planned form compute themselves.
    """
    module = model.get_submodule
    places: list[tuple[nn.Module, Forward]] = []
    for paths in plan.families:
        family = Family([module(path) for path in paths])
        places += [(layer, FastLinear(family, index)) for index, layer in enumerate(family.layers)]
    places += [(module(path), FastGatedMlp(module(path), gated, pieces)) for path, gated in plan.gated.items()]
    places += [(module(path), FastNorm(norm, pieces)) for path, norm in plan.norms.items()]
    places += [(module(path), FastAttention(module(path), known, pieces)) for path, known in plan.attentions.items()]
    with standing_in(places):
        yield


def _reason(layer: nn.Module) -> str | None:
    if reason := refusal(layer):
        return reason
    found = projection_of(layer)
    return found if isinstance(found, str) else None


def _match_attentions(
    model: nn.Module, modules: Mapping[str, nn.Module], arguments: Mapping[str, Any]
) -> dict[str, Rotary]:
    """Ask every attention with what the model really calls it with, on a packed row."""
    candidates = {path: module for path, module in modules.items() if may_match(module)}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(path: str) -> Any:
        return lambda _module, args, kwargs: calls.__setitem__(path, (args, kwargs))

    handles = [m.register_forward_pre_hook(note(path), with_kwargs=True) for path, m in candidates.items()]
    ids = arguments["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    try:
        with forward_arguments(model, ids, positions, None, apart(ids.shape[1:])) as packed:
            model(**packed)
    finally:
        for handle in handles:
            handle.remove()
    found = {path: match_attention(candidates[path], *calls[path]) for path in candidates if path in calls}
    return {path: known for path, known in found.items() if known is not None}
