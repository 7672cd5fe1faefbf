"""How a run computes its micro-batches: packed or padded, fast or plain, compiled or not, beginnings shared or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.data import sharing
from sideroad.data.batches import Batch, collate
from sideroad.data.encode import Encoded
from sideroad.kernels.causal_loss import causal_loss, forward_arguments
from sideroad.kernels.fast_loss import fast_loss
from sideroad.kernels.fast_path import FastPlan, fast_path
from sideroad.kernels.frozen_part import FrozenPart
from sideroad.kernels.head import Head
from sideroad.kernels.isolation import PackingRoute, packing
from sideroad.kernels.pieces import Pieces
from sideroad.kernels.predictions import Predictions
from sideroad.modes import in_eval_mode
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
        if self._may_share(examples):
            batch = sharing.share(examples)
        if batch is None:
            batch = collate(examples, packed=self.route.isolates, pad_id=self.pad_id)
        if self.store is None or not self.store.holds(examples):
            return batch
        return replace(batch, hidden=_assembled(batch, self.store.get(examples)))

    def saved_tokens(self, examples: Sequence[Encoded]) -> int:
        """Return how many tokens of a micro-batch `lay_out` leaves out, because another sequence has them."""
        return sharing.saved_tokens([one.ids for one in examples]) if self._may_share(examples) else 0

    def _may_share(self, examples: Sequence[Encoded]) -> bool:
        return self.shares and all(len(one) <= (self.reach or len(one)) for one in examples)

    def keeping(self, examples: Sequence[Encoded], config: TrainConfig, file: Path) -> Execution:
        """Return the same with a store for what enters the first adapted block; unchanged where nothing may be kept.

        Args:
            examples: those that come more than once, in a fixed order.
            file: where what does not fit into memory goes; close the store to remove it.
        """
        if self.frozen is None or not examples:
            return self
        kept = FrozenStore(
            examples,
            self._lower,
            width=self.frozen.width,
            dtype=self.frozen.dtype,
            memory_bytes=config.frozen_memory_mb * 10**6,
            disk_bytes=config.frozen_disk_mb * 10**6,
            file=file,
        )
        count = len(self.frozen.blocks)
        what = f"the {count} blocks" if count > 1 else "the block"
        said = f"{what} below the first adapted layer: computed once per example"
        lacking = f"frozen_memory_mb and frozen_disk_mb lack {kept.missing_bytes / 1e6:,.0f} MB for all of it"
        if kept.kept_share == 0:
            said = f"{what} below the first adapted layer: computed each time, {lacking}"
            return replace(self, notes=(*self.notes, said))
        said += "" if kept.kept_share == 1 else f" for {kept.kept_share:.0%} of the tokens; {lacking}"
        return replace(self, store=kept, notes=(*self.notes, said))

    @torch.no_grad()
    def _lower(self, examples: Sequence[Encoded]) -> list[Tensor]:
        """What enters the first adapted block for each example, [tokens, width], on the CPU."""
        assert self.frozen is not None
        batch = collate(examples, packed=self.route.isolates, pad_id=self.pad_id)
        with in_eval_mode(self.model), forward_arguments(self.model, *self._inputs(batch), batch.segments) as given:
            hidden = self.frozen.run(self.model, given).cpu()
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
