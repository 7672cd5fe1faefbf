"""How a run computes its micro-batches: packed or padded, fast or plain, compiled or not, beginnings shared or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.base.cache import cache_dir
from sideroad.data import sharing
from sideroad.data.batches import Batch, collate
from sideroad.data.encode import Encoded
from sideroad.errors import TrainingError
from sideroad.kernels.causal_loss import causal_loss, forward_arguments
from sideroad.kernels.compiled import compiled, earns, refusal
from sideroad.kernels.fast_loss import fast_loss
from sideroad.kernels.fast_path import FastPlan, fast_path, plan_fast_path
from sideroad.kernels.frozen_part import FrozenPart, find_frozen_part
from sideroad.kernels.head import Head, find_head
from sideroad.kernels.isolation import PackingRoute, packing, probe_sharing
from sideroad.kernels.packed_attention import window
from sideroad.kernels.pieces import EAGER, Pieces
from sideroad.kernels.predictions import Predictions
from sideroad.train.frozen_store import FrozenStore
from sideroad.train.settings import TrainConfig

_SHORT_ROW = 5


@dataclass(frozen=True)
class Execution:
    """What was decided; the same for a whole run, and taken up again by a resume.

    Attributes:
        fast: what goes the fast path; None for the plain one.
        head: the output head, where head and loss are one function.
        reach: longest sequence that may share its beginning; None: any; 0: nothing is shared.
        frozen: the blocks below the first adapted layer, where what they give may be kept.
        notes: one line each, for people.
        store: what they gave, see `keeping`.
    """

    model: nn.Module
    route: PackingRoute
    pad_id: int
    fast: FastPlan | None
    head: Head | None
    pieces: Pieces
    reach: int | None
    frozen: FrozenPart | None
    notes: tuple[str, ...]
    store: FrozenStore | None = None

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
        batch = None
        if self.shares and all(len(one) <= (self.reach or len(one)) for one in examples):
            batch = sharing.share(examples)
        if batch is None:
            batch = collate(examples, packed=self.route.isolates, pad_id=self.pad_id)
        return batch if self.store is None else replace(batch, hidden=_assembled(batch, self.store.get(examples)))

    def keeping(self, examples: Sequence[Encoded], config: TrainConfig, file: Path) -> Execution:
        """Return the same with a store for what enters the first adapted block; unchanged where nothing may be kept.

        Args:
            examples: all that the run goes through, in a fixed order.
            file: where what does not fit into memory goes; close the store to remove it.
        """
        if self.frozen is None:
            return self
        kept = FrozenStore(
            examples,
            self._lower,
            width=self.frozen.width,
            dtype=next(self.model.parameters()).dtype,
            memory_bytes=config.frozen_memory_mb * 10**6,
            disk_bytes=config.frozen_disk_mb * 10**6,
            file=file,
        )
        skipped = f"{len(self.frozen.blocks)} blocks below the first adapted layer are computed once per example"
        room = "" if kept.kept_share == 1 else f" for {kept.kept_share:.0%} of the tokens, as the limits allow"
        return replace(self, store=kept, notes=(f"{skipped}{room}",))

    @torch.no_grad()
    def _lower(self, examples: Sequence[Encoded]) -> list[Tensor]:
        """What enters the first adapted block for each example, [tokens, width], on the CPU."""
        assert self.frozen is not None
        batch = collate(examples, packed=self.route.isolates, pad_id=self.pad_id)
        with forward_arguments(self.model, *self._inputs(batch), batch.segments) as arguments:
            hidden = self.frozen.run(self.model, arguments).cpu()
        if batch.segments is not None:
            return list(torch.split(hidden[0], list(batch.lengths)))
        return [row[:length] for row, length in zip(hidden, batch.lengths, strict=True)]

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        device = next(self.model.parameters()).device
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        return batch.input_ids.to(device), batch.position_ids.to(device), mask

    def loss_of(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of one micro-batch on the model's device, an fp32 scalar."""
        if batch.hidden is None or self.frozen is None:
            return self._loss_of(batch)
        with self.frozen.skipped(batch.hidden.to(next(self.model.parameters()).device)):
            return self._loss_of(batch)

    def _loss_of(self, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        given = self._inputs(batch)
        if self.fast is None:
            lengths = batch.lengths if batch.attention_mask is None else None
            return causal_loss(self.model, *given, batch.targets.to(device), lengths)[0]
        predictions = Predictions.of(batch.targets, batch.extra).to(device)
        return fast_loss(self.model, self.head, self.pieces, *given, predictions, batch.segments)

    def to_json(self) -> dict[str, Any]:
        """What env.json records, and `choose_execution` takes up again."""
        return {
            "path": "plain" if self.fast is None else "fast",
            "pieces": self.pieces.kind,
            "shares": self.shares,
            "frozen_blocks": 0 if self.frozen is None else len(self.frozen.blocks),
        }


def _assembled(batch: Batch, parts: Sequence[Tensor]) -> Tensor:
    """Put the hidden states of examples together as the batch lays out their tokens."""
    if batch.attention_mask is not None:
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    together = torch.cat(list(parts))
    return (together if batch.origins is None else together[batch.origins])[None]


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
        return Execution(model, route, pad_id, None, None, EAGER, 0, None, ("fast path: off, as the recipe says",))
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
    frozen = _choose_frozen(model, short) if config.cache_frozen == "auto" and repeats else None
    used = None if isinstance(head, str) else head
    return Execution(model, route, pad_id, plan, used, pieces, reach, frozen, tuple(notes))


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


def _choose_frozen(model: nn.Module, short: Mapping[str, Any]) -> FrozenPart | None:
    """The blocks below the first adapted layer, if nothing up to there is random."""
    found = find_frozen_part(model, short)
    if isinstance(found, str):
        return None
    above = {module for block in _from(model, found.first) for module in block.modules()}
    return None if any(_drops(module) for module in model.modules() if module not in above) else found


def _from(model: nn.Module, first: nn.Module) -> list[nn.Module]:
    """A block and those behind it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = next(found for found in lists if first in found)
    return blocks[blocks.index(first) :]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops anything at random in training."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    named = ("dropout", "attention_dropout", "attn_dropout", "dropout_p")
    return any(isinstance(value := getattr(module, name, None), float) and value > 0 for name in named)
