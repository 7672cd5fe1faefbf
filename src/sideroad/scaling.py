"""The scale s of a low-rank branch: a rule, not a method."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

from sideroad.config import AdapterConfig, Scaling
from sideroad.targets import alpha_of, rank_of

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


def with_ranks(config: AdapterConfig, ranks: Mapping[str, int]) -> AdapterConfig:
    """Return the configuration with these ranks, every layer keeping the s that it had.

    The commonest pair of rank and alpha becomes the method's; the other layers are named in the patterns.

    Args:
        ranks: path of every adapted layer → its new rank.
    """
    rule = RULES[config.method.scaling]
    wanted = {}
    for path, rank in ranks.items():
        s = scale(config, path, rank_of(config, path))
        # rounding must not make the same alpha differ from layer to layer
        wanted[path] = rank, float(f"{s / rule(1.0, rank):.15g}")
    if not wanted:
        return config
    counts = Counter(wanted.values())
    # of equally common ones the largest: the order of layers must not matter
    rank, alpha = max(counts, key=lambda one: (counts[one], one))
    others = {f"re:{re.escape(path)}": one for path, one in wanted.items() if one != (rank, alpha)}
    return config.model_copy(
        update={
            "method": config.method.model_copy(update={"rank": rank, "alpha": alpha}),
            "rank_pattern": {path: one[0] for path, one in others.items() if one[0] != rank},
            "alpha_pattern": {path: one[1] for path, one in others.items() if one[1] != alpha},
        }
    )
