"""How many directions a change of a weight really uses."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007, eq. 3).

    It lies between 1 (one direction) and their number (all equal), and is 0 for a change that is zero.
    """
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    shares = singular_values / total
    return float(torch.special.entr(shares).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """Return the sum of squared singular values over the largest squared; 0 for a change that is zero."""
    largest = singular_values.max()
    return float((singular_values / largest).square().sum()) if largest > 0 else 0.0
