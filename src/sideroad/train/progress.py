"""Where a run stands after a whole number of steps: with the tensors beside it, all that a resume needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sideroad.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """Counters and scalars of a run at a step boundary. The random state is not among them: it is derived, not kept.

    `epoch` and `batch` are the cursor: the next micro-batch is number `batch` of `epoch`. `validated` is the step of
    the last validation, `waiting` the validations since the best one. `first_loss` and `hot_steps` are the watchdog's.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss: float | None = None
    first_loss: float | None = None
    hot_steps: int = 0
    loss_scale: float = 1.0
    scaled_steps: int = 0
    validated: int | None = None
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    waiting: int = 0
    stopped: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive the round trip bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Progress:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: keys are missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        found = set(values) if isinstance(values, dict) else set()
        if found != known:
            raise CheckpointError(
                f"progress must have the keys {', '.join(sorted(known))}; missing: {sorted(known - found)}, "
                f"unknown: {sorted(found - known)}. The checkpoint is of another version of sideroad."
            )
        return cls(**values)

    def after_validation(self, loss: float, patience: int | None, *, counts: bool = True) -> Progress:
        """The progress once the validation at this step gave `loss`; the lowest so far becomes the best.

        Args:
            counts: the adapter may be kept as it is now; otherwise the loss is only noted.
        """
        better = counts and (self.best_loss is None or loss < self.best_loss)
        waiting = 0 if better or not counts else self.waiting + 1
        return replace(
            self,
            validated=self.step,
            first_validation_loss=loss if self.first_validation_loss is None else self.first_validation_loss,
            last_validation_loss=loss,
            best_step=self.step if better else self.best_step,
            best_loss=loss if better else self.best_loss,
            waiting=waiting,
            stopped=patience is not None and waiting >= patience,
        )
