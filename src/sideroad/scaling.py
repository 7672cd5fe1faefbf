"""The scale s of a low-rank branch: a rule, not a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sideroad.config import AdapterConfig, Scaling
from sideroad.targets import alpha_of

RULES: Mapping[Scaling, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
}
"""Rule → s(alpha, rank): LoRA (arXiv:2106.09685, sec. 4.1) and rsLoRA (arXiv:2312.03732, eq. 8)."""


def scale(config: AdapterConfig, path: str, rank: int) -> float:
    """Return s for the layer at `path`, with the alpha that `alpha_pattern` gives it.

    Args:
        rank: of this layer's pair, which `rank_pattern` may have changed.
    """
    return RULES[config.method.scaling](alpha_of(config, path), rank)
