"""The largest of many scores, over all layers together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return which scores, [any] for each layer, are among the `count` largest of all; of equal ones the earlier.

    Returns:
        For each layer a mask like its scores, on the CPU.
    """
    flat = torch.cat([one.detach().cpu() for one in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return dict(zip(scores, torch.split(chosen, [len(one) for one in scores.values()]), strict=True))
