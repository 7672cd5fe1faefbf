"""Which learning rate comes next, and which was best: half-decades around a centre, extended where an edge is best."""

from __future__ import annotations

from collections.abc import Mapping

AROUND = 1
"""Half-decades tried on each side of the centre in any case."""
EXTRA = 2
"""More of them, at most, on a side whose edge is best."""

Merit = tuple[float, ...]
"""How good a run was on held-out rows, the larger the better; empty for one that diverged."""


def rate_of(half_decades: int) -> float:
    """Return 10^(half_decades / 2), to three digits."""
    return float(f"{10 ** (half_decades / 2):.2e}")


def next_rate(found: Mapping[int, Merit], centre: int, extra: int = EXTRA) -> int | None:
    """Return the next rate to try, in half-decades; None once the best one lies inside, or may move no further.

    Args:
        found: what was tried, in half-decades, and how good it was.
    """
    for at in (centre, *(centre + side * step for step in range(1, AROUND + 1) for side in (-1, 1))):
        if at not in found:
            return at
    best = best_rate(found)
    if best is None:  # all diverged: smaller ones may not
        return min(found) - 1 if centre - min(found) < AROUND + extra else None
    for edge, side in ((min(found), -1), (max(found), 1)):
        if best == edge and abs(edge + side - centre) <= AROUND + extra:
            return edge + side
    return None


def best_rate(found: Mapping[int, Merit]) -> int | None:
    """Return the best rate, in half-decades, of equally good ones the smallest; None if every run diverged."""
    sound = {at: merit for at, merit in found.items() if merit}
    return max(sorted(sound), key=lambda at: sound[at]) if sound else None


def is_at_edge(found: Mapping[int, Merit]) -> bool:
    """Whether the best rate is still the smallest or largest tried, so that a better one may lie beyond."""
    return best_rate(found) in (min(found), max(found))
