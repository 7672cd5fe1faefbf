"""The fast path of training: which modules of a model it takes over, and the block in which it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sideroad.kernels.fast_attention import FastAttention, match_attention
from sideroad.kernels.live import projection_of, refusal
from sideroad.kernels.packed_attention import is_installed
from sideroad.kernels.pieces import Pieces
from sideroad.kernels.stand_ins import Family, FastGatedMlp, FastLinear, FastNorm
from sideroad.kernels.structure import Gated, Norm, match_gated, match_norm, siblings
from sideroad.modes import in_eval_mode
from sideroad.route import deltas_of, walk


@dataclass(frozen=True)
class FastPlan:
    """What of a model goes the fast path, by module path.

    Attributes:
        families: linear layers that read one input, in the order of their calls.
        plain: why an adapted layer, or a block, computes itself.
    """

    families: tuple[tuple[str, ...], ...]
    gated: Mapping[str, Gated]
    norms: Mapping[str, Norm]
    attentions: tuple[str, ...]
    plain: Mapping[str, str]

    def lines(self) -> list[str]:
        """Say in words what is taken over, and what is not and why; layers with one reason share a line."""
        families = sum(1 for family in self.families if len(family) > 1)
        linear = sum(len(family) for family in self.families)
        found = [f"{linear} linear layers ({families} groups on one input)"] if linear else []
        found += [f"{len(self.gated)} gated blocks"] if self.gated else []
        found += [f"{len(self.norms)} RMSNorms"] if self.norms else []
        found += [f"{len(self.attentions)} rotary attentions"] if self.attentions else []
        lines = [f"fast path: {', '.join(found)}" if found else "fast path: nothing of this model matches it"]
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.plain.items():
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            some = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            lines.append(f"not on the fast path: {some}: {reason}")
        return lines


def plan_fast_path(model: nn.Module, arguments: Mapping[str, Any]) -> FastPlan:
    """Find what can be taken over, by structure and by asking the modules themselves.

    Runs the model once on a few tokens; mode, gradients and random state stay as they are. Attention is taken over only
    where segmented attention is in force (see `isolation.packing`).

    Args:
        arguments: of a short forward pass, such as a row of a few token ids.
    """
    modules = dict(walk(model))
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with torch.random.fork_rng(devices=devices), in_eval_mode(model), torch.no_grad():
        norms = {path: norm for path, module in modules.items() if (norm := match_norm(module)) is not None}
        gated = {path: block for path, module in modules.items() if (block := match_gated(module)) is not None}
        attentions = tuple(path for path, module in modules.items() if is_installed(model) and match_attention(module))
        adapted = {path: module for path, module in modules.items() if deltas_of(module) is not None}
        reasons = {path: _reason(module) for path, module in adapted.items()}
        plain = {path: reason for path, reason in reasons.items() if reason is not None}
        ready = {path: module for path, module in adapted.items() if path not in plain}
        families = tuple(siblings(model, ready, dict(arguments)))
    return FastPlan(families, gated, norms, attentions, plain)


@contextmanager
def fast_path(model: nn.Module, plan: FastPlan, pieces: Pieces) -> Iterator[None]:
    """Let a model compute as planned until the block ends, however it ends; the block must hold the backward pass.

    Adapters may be switched inside; layers whose adapters are not of the planned form compute themselves.
    """
    taken: list[nn.Module] = []

    def take(path: str, forward: Callable[..., Any]) -> None:
        module = model.get_submodule(path)
        module.__dict__["forward"] = forward
        taken.append(module)
        if (deltas := deltas_of(module)) is not None and isinstance(forward, FastLinear):
            deltas.inside = True

    try:
        for paths in plan.families:
            family = Family([model.get_submodule(path) for path in paths])
            for index, path in enumerate(paths):
                take(path, FastLinear(family, index))
        for path, gated in plan.gated.items():
            take(path, FastGatedMlp(model.get_submodule(path), gated, pieces))
        for path, norm in plan.norms.items():
            take(path, FastNorm(norm, pieces))
        for path in plan.attentions:
            take(path, FastAttention(model.get_submodule(path), pieces))
        yield
    finally:
        for module in taken:
            module.__dict__.pop("forward", None)
            if (deltas := deltas_of(module)) is not None:
                deltas.inside = False


def _reason(layer: nn.Module) -> str | None:
    if reason := refusal(layer):
        return reason
    found = projection_of(layer)
    return found if isinstance(found, str) else None
