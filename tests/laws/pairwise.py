"""A small set of cases in which every pair of values of every two axes meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def full(axes: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def covering(axes: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Greedily choose combinations until every pair of values is covered; always the same set."""
    cases = full(axes)
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen: list[Case] = []
    while missing:
        best = max(cases, key=lambda case: len(missing.intersection(_pairs(case))))
        chosen.append(best)
        missing.difference_update(_pairs(best))
    return chosen


def name(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.").replace("/", ":") for value in case.values())


def _pairs(case: Case) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    items = [(axis, str(value)) for axis, value in case.items()]
    return list(combinations(items, 2))
