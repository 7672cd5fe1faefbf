"""Stops a run that cannot end well, and says where, why as far as it can tell, and what to change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sideroad.errors import TrainingError, raise_findings
from sideroad.train.progress import Progress

PATIENCE = 5
"""Steps in a row above the limit after which a run counts as run away."""

MARGIN = 1.0
"""Nats above the loss of guessing, or above the first step's loss if that is larger, that a run may reach."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step before it is applied.

    `losses` are the sums over each micro-batch, `sources` the examples in each; `loss` is the step's mean.
    """

    step: int
    loss: float
    losses: Sequence[float]
    sources: Sequence[Sequence[str]]
    grad_norm: float
    lr: float


class Watchdog:
    """Looks at every step before the optimizer applies it.

    Args:
        vocabulary: tokens the model tells apart; guessing costs ln(vocabulary).
        dtype: of the base, for the diagnosis.
        parameters: trainable ones, by name.
    """

    def __init__(self, vocabulary: int, dtype: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self._guessing = math.log(vocabulary)
        self._dtype = dtype
        self._parameters = parameters
        self._norms: deque[float] = deque(maxlen=20)
        self.last_good: Path | None = None

    def check_gradients_exist(self) -> None:
        """Require a gradient, finite in every element, on each trainable parameter after the first backward pass.

        Raises:
            TrainingError: lists each parameter that has none, or a non-finite one.
        """
        findings = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                findings.append(
                    f"{name} got no gradient: the loss does not depend on it; the model does not call its layer. Leave "
                    "the layer out by adapter.exclude"
                )
            elif not bool(torch.isfinite(parameter.grad).all()):
                findings.append(f"{name} got a gradient that is not finite; base in {self._dtype}")
        shown = findings[:8] + ([f"and {len(findings) - 8} more"] if len(findings) > 8 else [])
        raise_findings(TrainingError, "first backward pass", shown)

    def check(self, report: StepReport, progress: Progress) -> Progress:
        """Judge one step; returns the progress with the watchdog's counters brought up to date.

        Raises:
            TrainingError: the loss or a gradient is not finite, or the loss has run away.
        """
        if not math.isfinite(report.loss):
            raise TrainingError(self._bad_loss(report))
        if not math.isfinite(report.grad_norm):
            raise TrainingError(self._bad_gradient(report))
        self._norms.append(report.grad_norm)
        first = report.loss if progress.first_loss is None else progress.first_loss
        limit = max(self._guessing, first) + MARGIN
        hot = progress.hot_steps + 1 if report.loss > limit else 0
        if hot >= PATIENCE:
            raise TrainingError(
                f"step {report.step}: the loss ran away: {report.loss:.3f} nats, for {hot} steps above {limit:.3f} "
                f"(guessing costs ln(vocabulary) = {self._guessing:.3f}, the first step had {first:.3f}). "
                + self._circumstances(report)
                + " Lower optim.lr, or lengthen the warm-up."
            )
        return replace(progress, first_loss=first, hot_steps=hot)

    def check_validation(self, step: int, loss: float, sources: Sequence[str]) -> None:
        """Judge the loss of one validation micro-batch.

        Raises:
            TrainingError: it is not finite.
        """
        if math.isfinite(loss):
            return
        advice = (
            "Lower optim.lr"
            if step
            else "Nothing has been trained yet, so it is the base: look for NaN in its weights, or load it anew"
        )
        raise TrainingError(
            f"the validation loss after step {step} is not finite, in {_some(sources)} (base in {self._dtype}). "
            f"{self._good()} {advice}{self._safer_dtype()}"
        )

    def _bad_loss(self, report: StepReport) -> str:
        guilty = [index for index, loss in enumerate(report.losses) if not math.isfinite(loss)]
        named = "; ".join(f"micro-batch {index} ({_some(report.sources[index])})" for index in guilty[:3])
        return (
            f"step {report.step}: the loss is not finite in {named or 'the sum of all micro-batches'}. "
            + self._circumstances(report)
            + " Look at these examples with `sideroad preview`; if they are sound, lower optim.lr"
            + self._safer_dtype()
        )

    def _bad_gradient(self, report: StepReport) -> str:
        guilty = [
            name
            for name, parameter in self._parameters.items()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        sources = [source for each in report.sources for source in each]
        return (
            f"step {report.step}: the loss is finite ({report.loss:.4f}) but the gradient is not, in "
            f"{_some(guilty) or 'its norm only'} (examples {_some(sources)}). "
            + self._circumstances(report)
            + " Lower optim.lr or optim.clip_norm"
            + self._safer_dtype()
        )

    def _circumstances(self, report: StepReport) -> str:
        norms = f"largest recent gradient norm {max(self._norms):.4g}" if self._norms else "no step before it"
        return (
            f"Learning rate {report.lr:.3g}, base in {self._dtype}, {norms}. This step was not applied. {self._good()}"
        )

    def _good(self) -> str:
        return f"Last good checkpoint: {self.last_good}." if self.last_good else "There is no checkpoint yet."

    def _safer_dtype(self) -> str:
        return "." if self._dtype == "float32" else ", or set base.dtype: float32."


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
