"""What a run tells whoever is watching, as values; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sideroad.base.progress import Progress
from sideroad.train.speed import Speed

Kept = Literal["last", "best"]


@dataclass(frozen=True)
class Note:
    """Something a person should know that is not an error: a fallback and its reason, a difference on resume."""

    text: str


@dataclass(frozen=True)
class Planned:
    """Said once, before the first step: how much work there is.

    `tokens` are real and `trained_tokens` supervised tokens over all `steps`; both count every repetition;
    `saved_tokens` of them are computed with another sequence's, whose beginning they share. `start` is the number of
    steps already done, above 0 on resume. `packed` says whether examples share a row in isolation.
    """

    steps: int
    start: int
    epochs: int
    examples: int
    validation_examples: int
    tokens: int
    trained_tokens: int
    saved_tokens: int
    packed: bool
    trainable_parameters: int
    device: str
    dtype: str


@dataclass(frozen=True)
class StepDone:
    """One optimizer step. `loss` is the mean over its trained tokens in nats; `grad_norm` is taken before clipping.

    `computed_tokens` include padding, and shared beginnings once. `peak_bytes` is the largest memory so far: the
    accelerator's allocations on CUDA and MPS, the whole process's resident set elsewhere. `seconds` are those of this
    step alone.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    trained_tokens: int
    real_tokens: int
    computed_tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Validated:
    """The validation set's loss (mean over its trained tokens, nats) after `step` steps; `best` if none was lower."""

    step: int
    loss: float
    best: bool
    seconds: float


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class StoppedEarly:
    """Validation loss has not fallen for `patience` validations in a row, so training ends at `step`."""

    step: int
    best_step: int
    patience: int


@dataclass(frozen=True)
class Evaluating:
    """`who`, the base model or the adapted one, is being scored: first its loss, then `answered` of `asked` answers.

    `asked` is 0 until the first answers are on their way.
    """

    who: Literal["base", "adapted"]
    examples: int
    answered: int = 0
    asked: int = 0


@dataclass(frozen=True)
class Answers:
    """One validation question (as a person reads it), its reference, and what the base and the adapted model said."""

    source: str
    prompt: str
    reference: str
    base: str
    adapted: str


@dataclass(frozen=True)
class Result:
    """What a finished run left behind.

    `kept` says which weights are in `adapter`: those of the last step or of the best validation; `kept_step` is theirs.
    `scores` maps `base` and `adapted` to metric → value, the loss first, and is empty without a validation set.
    `loss` is the last step's; `speed` that of the steps alone; `seconds` are those of steps and validations.
    """

    run: Path
    adapter: Path
    steps: int
    kept: Kept
    kept_step: int
    loss: float | None
    first_validation_loss: float | None
    last_validation_loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    stopped_early: bool
    seconds: float
    speed: Speed | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: tuple[Answers, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The run is complete and everything is on disk."""

    result: Result


Event = Progress | Note | Planned | StepDone | Validated | Checkpointed | StoppedEarly | Evaluating | Finished
