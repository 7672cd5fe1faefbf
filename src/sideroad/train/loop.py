"""The training loop: steps, validations and checkpoints in their order, from any step boundary on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sideroad.adapter import Adapter
from sideroad.data.batches import Batch
from sideroad.data.encode import Encoded
from sideroad.interrupts import uninterrupted
from sideroad.train import checkpoint
from sideroad.train.environment import peak_bytes
from sideroad.train.events import Checkpointed, Event, StepDone, StoppedEarly, Validated
from sideroad.train.execution import Execution
from sideroad.train.order import Cursor, Order
from sideroad.train.progress import Progress
from sideroad.train.run_directory import RunDirectory
from sideroad.train.settings import TrainConfig
from sideroad.train.steps import Prepared, Stepper
from sideroad.train.trackers import Receiver
from sideroad.train.watchdog import Watchdog


@dataclass(frozen=True)
class Material:
    """What a loop works on, fixed for the whole run.

    `validation` holds micro-batches of indices into `validation_examples`; both are empty without a validation set.
    `snapshot` gives the adapter as it stands; `fingerprint` is what its checkpoints are bound to.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    snapshot: Callable[[], Adapter]
    examples: Sequence[Encoded]
    validation_examples: Sequence[Encoded]
    order: Order
    validation: Sequence[tuple[int, ...]]
    execution: Execution
    device: torch.device
    fingerprint: Mapping[str, Any]


class Loop:
    """Drives a run from `progress` to its end.

    Args:
        progress: where to begin; with `restored` the parameters and the optimizer already stand there.
        steps: length of the whole run.
        emit: receives every event; what it raises ends the loop, and the run stays resumable.
        trackers: receive every record that goes to metrics.jsonl.
    """

    def __init__(
        self,
        run: RunDirectory,
        material: Material,
        stepper: Stepper,
        watchdog: Watchdog,
        config: TrainConfig,
        progress: Progress,
        *,
        steps: int,
        restored: bool,
        emit: Callable[[Event], None],
        trackers: Sequence[Receiver] = (),
    ) -> None:
        self.progress = progress
        self._run = run
        self._on = material
        self.stepper = stepper
        self._watchdog = watchdog
        self._config = config
        self._steps = steps
        self._emit = emit
        self._trackers = trackers
        self._saved = progress if restored else None

    def go(self) -> None:
        """Run to the end, validating and writing checkpoints on the way.

        The order at a step boundary is always validation, checkpoint, next step; what of it is done already is read
        off the progress, so a run may end and go on between any two of them.
        """
        while True:
            if self._validation_is_due():
                self._validate()
            if self._checkpoint_is_due():
                self.save()
            if self._is_over():
                return
            self._step()

    def save(self) -> Path:
        """Write a checkpoint of the last complete step unless the newest one is just that; returns its directory."""
        folder = self._run.checkpoints
        if self._saved == self.progress:
            return folder / checkpoint.name_of(self.progress.step)
        self._run.sync_metrics()
        tensors = self.stepper.state_tensors()
        path = checkpoint.write(folder, self.progress, self._on.snapshot(), tensors, self._on.fingerprint)
        self._saved = self.progress
        self._watchdog.last_good = path
        checkpoint.prune(folder, self._config.keep_checkpoints, self.progress.best_step)
        self._emit(Checkpointed(self.progress.step, path))
        return path

    def record(self, values: Mapping[str, Any]) -> None:
        """Add a record to metrics.jsonl and hand it to the trackers."""
        self._run.append_metrics(values)
        for tracker in self._trackers:
            tracker.log(values)

    def _is_over(self) -> bool:
        return self.progress.stopped or self.progress.step >= self._steps

    def _validation_is_due(self) -> bool:
        step = self.progress.step
        at = step % self._config.validate_every == 0 or step == self._steps
        return bool(self._on.validation) and at and self.progress.validated != step

    def _checkpoint_is_due(self) -> bool:
        if self._saved == self.progress:
            return False
        step = self.progress.step
        on_schedule = step > 0 and step % self._config.checkpoint_every == 0
        return on_schedule or self._is_over() or self.progress.best_step == step

    def _step(self) -> None:
        started = time.perf_counter()
        cursor = Cursor(self.progress.epoch, self.progress.batch)
        chosen, following = self._on.order.step(cursor)
        examples = [[self._on.examples[index] for index in indices] for indices in chosen]
        batches = [self._on.execution.lay_out(each) for each in examples]
        sources = [[example.source for example in each] for each in examples]
        prepared = self.stepper.prepare(self.progress, batches, sources)
        with uninterrupted():
            self.stepper.apply(prepared)
            done = self._done(prepared, batches, time.perf_counter() - started)
            self.progress = replace(
                prepared.progress,
                step=done.step,
                epoch=following.epoch,
                batch=following.batch,
                loss=done.loss,
                seconds=self.progress.seconds + done.seconds,
            )
            self.record(asdict(done))
        self._emit(done)

    def _done(self, prepared: Prepared, batches: Sequence[Batch], seconds: float) -> StepDone:
        return StepDone(
            step=self.progress.step + 1,
            loss=prepared.loss,
            lr=prepared.lr,
            grad_norm=prepared.grad_norm,
            trained_tokens=sum(batch.trained_tokens for batch in batches),
            real_tokens=sum(batch.real_tokens for batch in batches),
            computed_tokens=sum(batch.computed_tokens for batch in batches),
            seconds=seconds,
            peak_bytes=peak_bytes(self._on.device),
        )

    def _validate(self) -> None:
        started = time.perf_counter()
        loss = self._validation_loss()
        seconds = time.perf_counter() - started
        step, patience = self.progress.step, self._config.early_stopping
        with uninterrupted():
            budget = self.stepper.budget
            # AdaLoRA's ranks before the final phase are not those that were asked for
            judged = self.progress.after_validation(loss, patience, counts=budget is None or budget.settled(step))
            self.progress = replace(judged, seconds=judged.seconds + seconds)
            self.record({"step": step, "validation_loss": loss})
        self._emit(Validated(step, loss, best=judged.best_step == step, seconds=seconds))
        if judged.stopped and judged.best_step is not None and patience is not None:
            self._emit(StoppedEarly(step, judged.best_step, patience))

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Mean over all trained tokens of the validation set, in eval mode."""
        self._on.model.eval()
        total, count = 0.0, 0
        for indices in self._on.validation:
            batch = self._on.execution.lay_out([self._on.validation_examples[index] for index in indices])
            loss = float(self._on.execution.loss_of(batch))
            sources = [self._on.validation_examples[index].source for index in indices]
            self._watchdog.check_validation(self.progress.step, loss, sources)
            total += loss
            count += batch.trained_tokens
        return total / count
