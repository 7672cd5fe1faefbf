"""What `bench/train.py` found: ratios, the bars they are held to, the table, the JSON and the plot."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import CELLS
from sides import OURS, SIDES

NOISE = "differences under 8 % are noise"
RESTLESS = 2.0
"""A turn this many times slower than its side's median, per real token, was disturbed."""

SPEED_BARS = {
    ("1x512-half", "a"): (1.4, 1.8),
    ("2x512-all", "a"): (1.2, 1.6),
    ("quickstart", "a"): (1.8, 3.0),
    ("quickstart", "c"): (4.0, 8.0),
    ("quickstart-task", "a"): (2.4, 4.0),
    ("dolly-400", "a"): (3.5, 5.0),
}
"""(cell, peer) → how many times the peer's speed is required, and aimed at."""

NEVER_SLOWER = (1.0, 1.5)
"""The same against the fastest peer of every cell."""

MEMORY_BARS = {"sideroad": (0.55, 0.30), "sideroad-compiled": (0.45, 0.30)}
"""Our side → the largest share of the bare loop's memory that is allowed, and aimed at."""

Cell = dict[str, Any]
"""A measured cell: `what`, `sides`, `left_out`."""


@dataclass(frozen=True)
class Verdict:
    """A ratio beside what was required of it, in words that can be printed."""

    cell: str
    what: str
    found: float
    bar: float
    aim: float
    holds: bool
    reaches_aim: bool


def speed_ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, turn_by_turn: bool) -> float:
    """Return our real tokens a second over theirs.

    Args:
        turn_by_turn: turns hold the same rows on both sides, so the ratio is the median over turns; else that of the
            whole timed runs.
    """
    if not turn_by_turn:
        return float(_whole(ours) / _whole(theirs))
    return statistics.median(mine / other for mine, other in zip(_rates(ours), _rates(theirs), strict=True))


def complete(cell: Cell) -> Cell:
    """Add speeds and ratios to a cell's seconds, tokens and peaks."""
    sides: dict[str, dict[str, Any]] = cell["sides"]
    for name, side in sides.items():
        regroups = SIDES[name].regroups
        side["tokens_per_second"] = _whole(side) if regroups else statistics.median(_rates(side))
        side["ours_over_this"] = {
            our: speed_ratio(sides[our], side, turn_by_turn=not regroups)
            for our in OURS
            if our in sides and SIDES[name].peer
        }
        if "peak_bytes" in side and "peak_bytes" in sides.get("a", {}):
            side["memory_over_a"] = side["peak_bytes"] / max(1, sides["a"]["peak_bytes"])
    return cell


def verdicts(cells: Mapping[str, Cell]) -> list[Verdict]:
    """Hold what was measured against the bars; what was not measured is left out."""
    found = []
    for name, cell in cells.items():
        for our in (our for our in OURS if our in cell["sides"]):
            ratios = {
                side: one["ours_over_this"][our] for side, one in cell["sides"].items() if our in one["ours_over_this"]
            }
            for (where, peer), bars in SPEED_BARS.items():
                if where == name and peer in ratios:
                    found.append(_faster(name, f"{our} vs {peer}", ratios[peer], bars))
            if ratios:
                best = min(ratios, key=lambda side: ratios[side])
                found.append(_faster(name, f"{our} vs best peer ({best})", ratios[best], NEVER_SLOWER))
            share = cell["sides"][our].get("memory_over_a")
            if share is not None:
                bar, aim = MEMORY_BARS[our]
                found.append(Verdict(name, f"{our} memory vs a", share, bar, aim, share <= bar, share <= aim))
    return found


def table(cells: Mapping[str, Cell]) -> str:
    """Return cells and sides as lines of text."""
    columns = [our for our in OURS if any(our in cell["sides"] for cell in cells.values())]
    head = f"{'cell':<17}{'side':<38}{'real tok/s':>11}" + "".join(f"{our + ' is':>21}" for our in columns)
    lines = [head + f"{'peak MB':>10}{'of a':>7}{'first loss':>12}"]
    for name, cell in cells.items():
        for side, one in cell["sides"].items():
            ratios = [one["ours_over_this"].get(our) for our in columns]
            shown = "".join(f"{'' if ratio is None else f'{ratio:.2f}x':>21}" for ratio in ratios)
            memory = f"{one['peak_bytes'] / 1e6:>10.0f}" if "peak_bytes" in one else " " * 10
            share = f"{one['memory_over_a']:>7.0%}" if "memory_over_a" in one else " " * 7
            label = side if side in OURS else f"{side:<4}{SIDES[side].what}"
            begin = f"{name:<17}{label:<38}{one['tokens_per_second']:>11.0f}"
            lines.append(f"{begin}{shown}{memory}{share}{one['first_loss']:>12.5f}")
        lines += [f"{name:<17}{side} left out: {why}" for side, why in cell["left_out"].items()]
    return "\n".join(lines)


def bars(judgements: Sequence[Verdict]) -> str:
    """Return the verdicts as lines of text."""
    lines = [f"{'cell':<17}{'what':<40}{'found':>8}{'bar':>8}{'':>7}{'aim':>8}"]
    for one in judgements:
        form = "{:.0%}" if "memory" in one.what else "{:.2f}x"
        found, bar, aim = (form.format(value) for value in (one.found, one.bar, one.aim))
        judged = ["ok" if well else "below" for well in (one.holds, one.reaches_aim)]
        lines.append(f"{one.cell:<17}{one.what:<40}{found:>8}{bar:>8} {judged[0]:<6}{aim:>8} {judged[1]}")
    return "\n".join([*lines, f"({NOISE})"])


def disturbed(cell: Cell) -> str:
    """Return a line on turns that something else on the machine must have slowed; empty if there are none."""
    worst = {side: statistics.median(_rates(one)) / min(_rates(one)) for side, one in cell["sides"].items()}
    named = [f"{side} {times:.1f}x" for side, times in worst.items() if times >= RESTLESS]
    return f"disturbed; measure again (slowest turn over the median, per token: {', '.join(named)})" if named else ""


def read_kept(path: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the JSON holds of the same machine, versions and settings; else a new, empty result."""
    fresh: dict[str, Any] = {"machine": dict(machine), "cells": {}}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fresh
    if kept.get("machine") == fresh["machine"]:
        return {**fresh, **kept}
    print(f"{path.name} is of another machine, other versions or settings; it is replaced when the first cell is done")
    return fresh


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the JSON in one piece, with the verdicts as they stand, and the plot beside it."""
    order = [name for name in CELLS if name in found["cells"]]
    found["cells"] = {name: found["cells"][name] for name in order}
    found["bars"] = [asdict(one) for one in verdicts(found["cells"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
    if found["cells"]:
        _plot(found, path.with_suffix(".png"))


def _faster(cell: str, what: str, found: float, bars: tuple[float, float]) -> Verdict:
    bar, aim = bars
    return Verdict(cell, what, found, bar, aim, found >= bar, found >= aim)


def _rates(side: Mapping[str, Any]) -> list[float]:
    return [tokens / taken for tokens, taken in zip(side["real_tokens"], side["seconds"], strict=True)]


def _whole(side: Mapping[str, Any]) -> float:
    return float(sum(side["real_tokens"]) / sum(side["seconds"]))


def _plot(found: Mapping[str, Any], path: Path) -> None:
    """Grouped bars of real tokens a second, relative to the bare PEFT loop."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells = {name: cell for name, cell in found["cells"].items() if "a" in cell["sides"]}
    shown = [side for side in SIDES if any(side in cell["sides"] for cell in cells.values())]
    if not cells:
        return
    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.6 * len(cells) + 3), 4.5), layout="constrained")
    width = 0.85 / len(shown)
    for number, side in enumerate(shown):
        places = [at for at, cell in enumerate(cells.values()) if side in cell["sides"]]
        heights = [_relative(cell["sides"], side) for cell in cells.values() if side in cell["sides"]]
        drawn = axes.bar([at + (number - (len(shown) - 1) / 2) * width for at in places], heights, width)
        drawn.set_label(SIDES[side].what)
        axes.bar_label(drawn, fmt="%.1f", fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(cells)), list(cells), rotation=20, ha="right")
    axes.set_ylabel("real tokens/s over the bare PEFT loop")
    facts = found["machine"]
    axes.set_title(f"{facts['base']}, {facts['dtype']}, {facts['threads']} threads; {NOISE}", fontsize=9)
    figure.legend(fontsize=7, loc="outside right upper")
    draft = path.with_name(path.stem + ".tmp.png")
    figure.savefig(draft, dpi=150)
    pyplot.close(figure)
    os.replace(draft, path)


def _relative(sides: Mapping[str, Mapping[str, Any]], side: str) -> float:
    regroups = SIDES[side].regroups
    return speed_ratio(sides[side], sides["a"], turn_by_turn=not regroups)
