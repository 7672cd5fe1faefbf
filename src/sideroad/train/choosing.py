"""Decides how a run computes, by asking the model, and says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sideroad.base.cache import cache_dir
from sideroad.errors import TrainingError
from sideroad.kernels.compiled import compiled, earns, failure, folder_for, is_warm, refusal
from sideroad.kernels.fast_path import plan_fast_path
from sideroad.kernels.frozen_part import FrozenPart, find_frozen_part
from sideroad.kernels.head import find_head
from sideroad.kernels.isolation import PackingRoute, packing, probe_sharing
from sideroad.kernels.packed_attention import window
from sideroad.kernels.pieces import EAGER, Pieces
from sideroad.modes import cuda_devices, in_eval_mode, in_train_mode
from sideroad.train.execution import Execution
from sideroad.train.settings import TrainConfig

_SHORT_ROW = 5


def short_row(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of a short forward pass."""
    return {"input_ids": torch.arange(_SHORT_ROW, device=next(model.parameters()).device)[None]}


def choose_execution(
    model: nn.Module,
    route: PackingRoute,
    config: TrainConfig,
    *,
    pad_id: int,
    share: bool = True,
    repeats: bool = False,
    seconds: float | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Execution:
    """Decide how a run computes, by asking the model; adapters must be attached.

    Args:
        route: how packed rows are kept apart; kind `none` for padding.
        share: compute common beginnings once, where it is exact.
        repeats: examples come more than once, so what frozen blocks give them may be kept.
        seconds: what the run is expected to take, for `compile: auto`; None: it is not known, so nothing is compiled.
        recorded: `to_json` of the run that is resumed; its choice about compiling is kept.
    """
    if not config.fast:
        said = "fast path: off, as the recipe says" + ("; so nothing is compiled" if config.compile == "on" else "")
        return Execution(model, route, pad_id, None, None, EAGER, 0, None, (said,))
    short = short_row(model)
    with packing(model, route):
        plan, head = plan_fast_path(model, short), find_head(model, short)
    notes = plan.lines()
    if isinstance(head, str):
        notes.append(f"computed the usual way: head and loss: {head}")
    if reason := _random_beyond_dropout(model, short):
        share = False
        notes.append(f"common beginnings are not shared: {reason}")
    pieces, why = _choose_pieces(model, config, seconds, recorded)
    notes += why
    reach, why = _choose_sharing(model, route) if share else (0, [])
    notes += why
    frozen, why = _choose_frozen(model, short) if config.cache_frozen == "auto" and repeats else (None, [])
    notes += why
    used = None if isinstance(head, str) else head
    return Execution(model, route, pad_id, plan, used, pieces, reach, frozen, tuple(notes))


def _choose_pieces(
    model: nn.Module, config: TrainConfig, seconds: float | None, recorded: Mapping[str, Any] | None
) -> tuple[Pieces, list[str]]:
    if config.compile == "off":
        return EAGER, []
    device = next(model.parameters()).device
    folder = folder_for(cache_dir())
    before = None if recorded is None else recorded.get("pieces") == "compiled"
    earned = seconds is not None and earns(seconds, warm=is_warm(folder))
    if not (config.compile == "on" or (earned if before is None else before)):
        return EAGER, []
    pieces = None
    reason = refusal(device)
    if reason is None:
        pieces = compiled(folder)
        reason = failure(pieces, device)
    if reason is None and pieces is not None:
        why = "as the recipe says" if config.compile == "on" else "the run is long enough to earn it"
        return pieces, [f"compiling the elementwise parts (some seconds, once): {why}"]
    if config.compile == "on":
        raise TrainingError(f"train.compile: on, but {reason}. Set it to off, or to auto.")
    return EAGER, [f"nothing is compiled, though this run would earn it: {reason}"]


def _choose_sharing(model: nn.Module, route: PackingRoute) -> tuple[int | None, list[str]]:
    """The longest sequence that may share its beginning (0: none may), and why not."""
    if route.kind != "segments":
        return 0, []
    dropping = [path for path, module in model.named_modules() if drops(module)]
    if dropping:
        return 0, [f"common beginnings are not shared: each copy has dropout of its own ({dropping[0] or 'the model'})"]
    reason = probe_sharing(model)
    if reason is not None:
        return 0, [f"common beginnings are not shared: {reason}"]
    return window(model), []


def _random_beyond_dropout(model: nn.Module, short: Mapping[str, Any]) -> str | None:
    """Say so if a model computes otherwise in training mode though no module of it names a dropout."""
    if any(drops(module) for module in model.modules()):
        return None  # named where sharing is chosen
    found = []
    for mode, seed in ((in_eval_mode, 0), (in_train_mode, 1), (in_train_mode, 2)):
        with mode(model), torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(model)):
            torch.manual_seed(seed)
            found.append(model(**short).logits)
    alike = all(torch.equal(found[0], other) for other in found[1:])
    return None if alike else f"{type(model).__name__} computes something else in training"


def _choose_frozen(model: nn.Module, short: Mapping[str, Any]) -> tuple[FrozenPart | None, list[str]]:
    """The blocks below the first adapted layer, if nothing up to there is random, and why there are none."""
    found = find_frozen_part(model, short)
    if found is None:
        return None, []
    if not isinstance(found, str):
        above = {module for block in found.above for module in block.modules()}
        if not any(drops(module) for module in model.modules() if module not in above):
            return found, []
        found = "the model has dropout of its own"
    return None, [f"blocks below the first adapted layer are computed in every epoch: {found}"]


def drops(module: nn.Module) -> bool:
    """Whether a module drops anything at random in training, by what it says of itself: `p`, `hidden_dropout`, ..."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
