"""A small set of cases in which every pair of values of every two axes meets."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def full(axes: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def covering(axes: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Greedily choose combinations until every pair of values is covered; always the same set.

    Args:
        possible: which combinations there are; pairs that are in none of them need no cover.
    """
    left = [(case, frozenset(_pairs(case))) for case in full(axes) if possible(case)]
    missing = frozenset().union(*(pairs for _, pairs in left))
    chosen: list[Case] = []
    # how many missing pairs a case has only falls, so the old count bounds the new one
    queue = [(-len(pairs), index) for index, (_, pairs) in enumerate(left)]
    heapq.heapify(queue)
    while missing:
        while True:
            count, index = queue[0]
            now = -len(missing & left[index][1])
            if now == count:
                break
            heapq.heapreplace(queue, (now, index))
        chosen.append(left[index][0])
        missing -= left[index][1]
    return chosen


def name(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.").replace("/", ":") for value in case.values())


def _pairs(case: Case) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    items = [(axis, str(value)) for axis, value in case.items()]
    return list(combinations(items, 2))
