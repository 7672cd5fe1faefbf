"""Which examples make up which micro-batch of which step: a function of the seed, so a resume needs only a cursor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sideroad.data.batches import plan_epoch
from sideroad.data.sharing import group
from sideroad.train.settings import OptimConfig, TrainConfig

MicroBatch = tuple[int, ...]
"""Indices into the training set."""


@dataclass(frozen=True)
class Cursor:
    """The next micro-batch: its number in its epoch."""

    epoch: int = 0
    batch: int = 0


class Order:
    """Training order of a run.

    Args:
        lengths: tokens of each example.
        seed: of the data order alone.
        packed: rows are packed, so grouping by length gains nothing.
        ids: tokens of each example, where common beginnings are computed once: the examples of a step are then dealt
            to its micro-batches so that they meet. Which examples make up a step does not change.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        optim: OptimConfig,
        *,
        seed: int,
        packed: bool,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._lengths = lengths
        self._optim = optim
        self._seed = seed
        self._packed = packed
        self._ids = ids
        self._cached: tuple[int, list[MicroBatch]] | None = None

    def epoch(self, number: int) -> list[MicroBatch]:
        """Micro-batches of one epoch; each example is in exactly one."""
        if self._cached is None or self._cached[0] != number:
            plan = plan_epoch(
                self._lengths,
                batch_size=self._optim.batch_size,
                max_tokens=self._optim.batch_tokens,
                seed=self._seed,
                epoch=number,
                group_by_length=not self._packed,
                padded=not self._packed,
            )
            self._cached = (number, list(plan))
        return self._cached[1]

    def step(self, cursor: Cursor) -> tuple[list[MicroBatch], Cursor]:
        """Micro-batches of the step at `cursor`, and the cursor after it; no step reaches into the next epoch."""
        plan = self.epoch(cursor.epoch)
        end = cursor.batch + self._optim.accumulate
        following = Cursor(cursor.epoch, end) if end < len(plan) else Cursor(cursor.epoch + 1, 0)
        chosen = plan[cursor.batch : end]
        # by tokens, a batch's size is limited by what is in it, so its members stay
        if self._ids is not None and len(chosen) > 1 and self._optim.batch_tokens is None:
            chosen = group(chosen, self._ids)
        return chosen, following

    def steps(self, config: TrainConfig) -> Iterator[list[MicroBatch]]:
        """Every step of a run from its beginning, as many as the epochs and `max_steps` allow."""
        cursor, taken = Cursor(), 0
        while cursor.epoch < config.epochs and (config.max_steps is None or taken < config.max_steps):
            batches, cursor = self.step(cursor)
            taken += 1
            yield batches
