"""How a run computes its micro-batches: packed or padded, fast or plain, compiled or not, beginnings shared or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.base.cache import cache_dir
from sideroad.data import sharing
from sideroad.data.batches import Batch, collate
from sideroad.data.encode import Encoded
from sideroad.errors import TrainingError
from sideroad.kernels.causal_loss import causal_loss
from sideroad.kernels.compiled import compiled, earns, refusal
from sideroad.kernels.fast_loss import fast_loss
from sideroad.kernels.fast_path import FastPlan, fast_path, plan_fast_path
from sideroad.kernels.head import Head, find_head
from sideroad.kernels.isolation import PackingRoute, packing, probe_sharing
from sideroad.kernels.packed_attention import window
from sideroad.kernels.pieces import EAGER, Pieces
from sideroad.kernels.predictions import Predictions
from sideroad.train.settings import TrainConfig

_SHORT_ROW = 5


@dataclass(frozen=True)
class Execution:
    """What was decided; the same for a whole run, and taken up again by a resume.

    Attributes:
        fast: what goes the fast path; None for the plain one.
        head: the output head, where head and loss are one function.
        reach: longest sequence that may share its beginning; None: any; 0: nothing is shared.
        notes: one line each, for people.
    """

    model: nn.Module
    route: PackingRoute
    pad_id: int
    fast: FastPlan | None
    head: Head | None
    pieces: Pieces
    reach: int | None
    notes: tuple[str, ...]

    @property
    def shares(self) -> bool:
        """Whether common beginnings are computed once."""
        return self.reach != 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put the decisions into force; the block must hold forward and backward passes."""
        with packing(self.model, self.route):
            if self.fast is None:
                yield
                return
            with fast_path(self.model, self.fast, self.pieces):
                yield

    def lay_out(self, examples: Sequence[Encoded]) -> Batch:
        """Return examples as one micro-batch."""
        if self.shares and all(len(one) <= (self.reach or len(one)) for one in examples):
            shared = sharing.share(examples)
            if shared is not None:
                return shared
        return collate(examples, packed=self.route.isolates, pad_id=self.pad_id)

    def loss_of(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of one micro-batch on the model's device, an fp32 scalar."""
        device = next(self.model.parameters()).device
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        given = (batch.input_ids.to(device), batch.position_ids.to(device), mask)
        if self.fast is None:
            lengths = batch.lengths if mask is None else None
            return causal_loss(self.model, *given, batch.targets.to(device), lengths)[0]
        predictions = Predictions.of(batch.targets, batch.extra).to(device)
        return fast_loss(self.model, self.head, self.pieces, *given, predictions, batch.segments)

    def to_json(self) -> dict[str, Any]:
        """What env.json records, and `choose_execution` takes up again."""
        return {
            "path": "plain" if self.fast is None else "fast",
            "pieces": self.pieces.kind,
            "shares": self.shares,
        }


def choose_execution(
    model: nn.Module,
    route: PackingRoute,
    config: TrainConfig,
    *,
    pad_id: int,
    share: bool = True,
    seconds: float | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Execution:
    """Decide how a run computes, by asking the model; adapters must be attached.

    Args:
        route: how packed rows are kept apart; kind `none` for padding.
        share: compute common beginnings once, where it is exact.
        seconds: what the run is expected to take, for `compile: auto`; None: it is not known, so nothing is compiled.
        recorded: `to_json` of the run that is resumed; its choice about compiling is kept.
    """
    if not config.fast:
        return Execution(model, route, pad_id, None, None, EAGER, 0, ("fast path: off, as the recipe says",))
    short = {"input_ids": torch.arange(_SHORT_ROW, device=next(model.parameters()).device)[None]}
    with packing(model, route):
        plan, head = plan_fast_path(model, short), find_head(model, short)
    notes = plan.lines()
    if isinstance(head, str):
        notes.append(f"not on the fast path: head and loss: {head}")
    pieces, why = _choose_pieces(model, config, seconds, recorded)
    notes += why
    reach, why = _choose_sharing(model, route) if share else (0, [])
    notes += why
    return Execution(model, route, pad_id, plan, None if isinstance(head, str) else head, pieces, reach, tuple(notes))


def _choose_pieces(
    model: nn.Module, config: TrainConfig, seconds: float | None, recorded: Mapping[str, Any] | None
) -> tuple[Pieces, list[str]]:
    if config.compile == "off":
        return EAGER, []
    device = next(model.parameters()).device
    reason = refusal(device)
    if reason is not None:
        if config.compile == "on":
            raise TrainingError(f"train.compile: on, but {reason}. Set it to off, or to auto.")
        return EAGER, []
    folder = cache_dir() / "compiled"
    if recorded is not None:
        wanted = recorded.get("pieces") == "compiled"
    else:
        wanted = config.compile == "on" or (seconds is not None and earns(seconds, warm=folder.is_dir()))
    if not wanted:
        return EAGER, []
    earned = "as the recipe says" if config.compile == "on" else f"about {(seconds or 0) / 60:.0f} minutes earn it"
    return compiled(folder), [f"elementwise pieces are compiled: {earned}"]


def _choose_sharing(model: nn.Module, route: PackingRoute) -> tuple[int | None, list[str]]:
    """The longest sequence that may share its beginning (0: none may), and why not."""
    if route.kind != "segments":
        return 0, []
    dropping = [path for path, module in model.named_modules() if _drops(module)]
    if dropping:
        return 0, [f"common beginnings are not shared: each copy has dropout of its own ({dropping[0]})"]
    reason = probe_sharing(model)
    if reason is not None:
        return 0, [f"common beginnings are not shared: {reason}"]
    return window(model), []


def _drops(module: nn.Module) -> bool:
    """Whether a module drops anything at random in training."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    named = ("dropout", "attention_dropout", "attn_dropout", "dropout_p")
    return any(isinstance(value := getattr(module, name, None), float) and value > 0 for name in named)
