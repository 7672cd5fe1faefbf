"""Learning rate over a run as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

from sideroad.train.settings import OptimConfig


def warmup_length(config: OptimConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`: those asked for, or the ratio rounded up; at most `steps`."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, steps)
    return min(math.ceil((config.warmup_ratio or 0.0) * steps), steps)


def factor(config: OptimConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate for the step with index `step`, counted from 0, in a run of `steps`.

    Warm-up rises in a line and reaches 1 with its last step, `(step + 1) / warmup`, so no step is taken at zero. With
    p = (step - warmup) / (steps - warmup) in [0, 1) and m = `min_lr_ratio`:

        constant   1
        linear     1 - (1 - m) p
        cosine     m + (1 - m) (1 + cos(pi p)) / 2                               Loshchilov & Hutter, arXiv:1608.03983
        wsd        1, then linear to m over the last `decay_ratio` of the steps  Hu et al. 2024, arXiv:2404.06395

    The end value m belongs to `step == steps`, one past the last step taken.
    """
    warmup = warmup_length(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    floor = config.min_lr_ratio
    if config.schedule == "linear":
        return 1 - (1 - floor) * progress
    if config.schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "wsd":
        decay = max(min(math.ceil((config.decay_ratio or 0.0) * steps), steps - warmup), 1)
        return 1 - (1 - floor) * max(step - (steps - decay), 0) / decay
    return 1.0
