"""Training as `bench/methods.py` does it for every method: sideroad's own step, the same batches in the same order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from method_table import Adapted, Method
from torch import Tensor, nn
from torch.optim import Optimizer

from sideroad.train.progress import Progress
from sideroad.train.seeds import derive
from sideroad.train.settings import OptimConfig
from sideroad.train.steps import Stepper
from sideroad.train.watchdog import Watchdog

Turn = tuple[Any, Sequence[str]]
"""A batch with `trained_tokens` and `real_tokens`, and the names of its rows."""


@dataclass(frozen=True)
class Subject:
    """A model ready to be trained by one method.

    Attributes:
        adapted: what the method trains.
        head: what is trained beside it in every method, at a rate of its own.
        loss_of: batch → summed loss.
        outcomes: what a prediction tells apart; guessing costs its logarithm.
        running: gives what must be in force while training.
    """

    model: nn.Module
    adapted: Adapted
    loss_of: Callable[[Any], Tensor]
    outcomes: int
    head: Mapping[str, nn.Parameter] = field(default_factory=dict)
    running: Callable[[], AbstractContextManager[Any]] = nullcontext


def optimisation(method: Method, rate: float) -> OptimConfig:
    """Return sideroad's defaults (cosine, 3 % warm-up, clipping at 1, no decay) with what the method changes."""
    return OptimConfig(lr=rate, **method.optim)


def fit(
    subject: Subject, turns: Iterable[Turn], method: Method, rate: float, *, head_rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """Take the steps; returns the cell's numbers on training.

    Args:
        rate: peak of the method's parameters; of the head where the method trains nothing else.
        steps: length of the run for the schedule; `turns` may be fewer.
    Raises:
        TrainingError: the run diverged, or a parameter gets no gradient.
    """
    parameters = {**subject.adapted.parameters, **subject.head}
    watchdog = Watchdog(subject.outcomes, "float32", parameters)
    stepper = Stepper(
        subject.model,
        parameters,
        optimisation(method, rate),
        watchdog,
        loss_of=subject.loss_of,
        steps=steps,
        seed=derive(seed, "dropout"),
        budget=subject.adapted.budget(steps) if subject.adapted.budget else None,
    )
    if subject.head:
        part(stepper.optimizer, list(subject.head.values()), rate if method.trains == "head" else head_rate)
    progress, seconds, losses, tokens = Progress(), [], [], 0
    with subject.running():
        for batch, names in turns:
            started = time.perf_counter()
            prepared = stepper.prepare(progress, [batch], [names])
            stepper.apply(prepared)
            seconds.append(time.perf_counter() - started)
            progress = replace(prepared.progress, step=progress.step + 1)
            losses.append(prepared.loss)
            tokens += batch.real_tokens
    return {
        "steps": len(losses),
        "tokens": tokens,
        "step_seconds": statistics.median(seconds),
        "train_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "trainable": sum(one.numel() for one in subject.adapted.parameters.values()),
        "head": sum(one.numel() for one in subject.head.values()),
    }


def part(optimizer: Optimizer, chosen: Sequence[nn.Parameter], rate: float) -> None:
    """Move parameters to a group of their own, whose peak is `rate`."""
    own = {id(one) for one in chosen}
    for group in optimizer.param_groups:
        group["params"] = [one for one in group["params"] if id(one) not in own]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": list(chosen), "kind": "head", "peak": rate, "lr": rate, "weight_decay": 0.0})
