"""The `optim` and `train` sections of a recipe; importing them loads neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sideroad.config import Settings

Schedule = Literal["constant", "linear", "cosine", "wsd"]
Keep = Literal["last", "best"]
Tracker = Literal["tensorboard", "wandb"]
Compile = Literal["auto", "on", "off"]
CacheFrozen = Literal["auto", "off"]

WSD_DECAY_RATIO = 0.2


class OptimConfig(Settings):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), its learning-rate schedule, and how much data a step sees."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of A matrices and biases."""
    lr_ratio_b: Annotated[float, Field(gt=0)] = 1.0
    """B's learning rate over A's (LoRA+, arXiv:2402.12354); 1 is plain LoRA, the paper suggests 16."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = 0.03
    """Warm-up as a share of all steps, rounded up; null when `warmup_steps` is given."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in steps, in place of `warmup_ratio`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the schedule ends, as a share of the peak; a constant schedule has no end value."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of all steps in the final decay of `wsd` (0.2 there); null for the other schedules."""
    batch_size: Annotated[int, Field(ge=1)] | None = 8
    """Examples in a micro-batch; null when `batch_tokens` is given."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in a micro-batch, padding included, in place of `batch_size`."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches in an optimizer step; an epoch's last step may have fewer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of A and B; biases have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient over all trained parameters; null never clips."""

    @model_validator(mode="before")
    @classmethod
    def _choose_alternatives(cls, values: Any) -> Any:
        """A key given in place of another one puts that one's default out of force."""
        if not isinstance(values, Mapping):
            return values
        chosen = dict(values)
        for given, default in (("batch_tokens", "batch_size"), ("warmup_steps", "warmup_ratio")):
            if chosen.get(given) is not None:
                chosen.setdefault(default, None)
        if chosen.get("schedule") == "wsd" and chosen.get("decay_ratio") is None:
            chosen["decay_ratio"] = WSD_DECAY_RATIO
        return chosen

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> OptimConfig:
        wrong = []
        if self.batch_size is not None and self.batch_tokens is not None:
            wrong.append("batch_size and batch_tokens exclude each other; keep one")
        if self.batch_size is None and self.batch_tokens is None:
            wrong.append("batch_size and batch_tokens are both null; give one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            wrong.append("warmup_steps and warmup_ratio exclude each other; keep one")
        if self.schedule != "wsd" and self.decay_ratio is not None:
            wrong.append(f"decay_ratio belongs to schedule wsd, not {self.schedule}; remove it")
        if self.schedule == "constant" and self.min_lr_ratio:
            wrong.append(
                "a constant schedule does not fall to min_lr_ratio; choose linear, cosine or wsd, or remove it"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class TrainConfig(Settings):
    """The loop: how long, how often it looks up, and what it keeps."""

    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training set, each in its own order."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps even if epochs remain; the schedule then ends there."""
    validate_every: Annotated[int, Field(ge=1)] = 25
    """Steps between validations; there is one before the first step and one after the last."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints; a new best validation and the last step get one too."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep; the best one stays besides."""
    keep: Keep = "last"
    """Which weights become `adapter/`: the last step's or those of the lowest validation loss."""
    early_stopping: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many validations in a row without a lower loss; null never does."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    fast: bool = True
    """Fused kernels where the model's structure matches them, equal to the plain path up to rounding; false: never."""
    cache_frozen: CacheFrozen = "auto"
    """Keep what enters the first adapted block, so that the blocks below are computed once per example and not in every
    epoch: `auto`, where that is exact and examples come again, or `off`."""
    frozen_memory_mb: Annotated[int, Field(ge=0)] = 1024
    """Memory for that, in MB; what does not fit goes to a file in the run directory."""
    frozen_disk_mb: Annotated[int, Field(ge=0)] = 8192
    """Largest size of that file, in MB; what fits nowhere is computed each time."""
    compile: Compile = "auto"
    """Compile the elementwise pieces of the fast path: `on`, `off`, or `auto`, if the run is long enough to earn it."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`."""
