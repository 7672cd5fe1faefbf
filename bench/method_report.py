"""What `bench/methods.py` found: one line a method, the table, the JSON, and quality against trainable parameters."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from method_results import Results, merits, settings_of
from method_sweep import best_rate, is_at_edge, rate_of
from method_table import METHODS
from method_tasks import TASKS, Budget

Row = dict[str, Any]
"""A method on a task, summed up."""


def summarise(results: Results, budgets: Mapping[str, Budget], methods: Sequence[str]) -> dict[str, dict[str, Row]]:
    """Return task → method → numbers, of what is finished: at least the sweep's first runs."""
    found: dict[str, dict[str, Row]] = {}
    for task, budget in budgets.items():
        names = [name for name in METHODS if name in methods and name in TASKS[task].methods]
        rows = {name: _row(results, task, budget, name) for name in names}
        found[task] = {name: row for name, row in rows.items() if row}
    return found


def _row(results: Results, task: str, budget: Budget, name: str) -> Row:
    settings = settings_of(TASKS[task], budget, METHODS[name])
    swept = results.of("sweep", task, name, settings)
    if not swept:
        return {}
    good = merits(swept, TASKS[task])
    best = best_rate(good)
    row: Row = {
        "rates": {f"{rate_of(cell['half_decades']):g}": cell.get("validation", cell.get("failed")) for cell in swept},
        "rate": None if best is None else rate_of(best),
        "at_edge": is_at_edge(good),
    }
    every = [cell for cell in results.of("score", task, name, settings) if cell["half_decades"] == best]
    scored = [cell for cell in every if "test" in cell]
    row["diverged"] = len(every) - len(scored)
    if scored:
        row |= _numbers([cell["test"][TASKS[task].metric] for cell in scored])
        row |= {key: scored[0][key] for key in ("trainable", "head", "steps")}
        row["step_seconds"] = statistics.median(cell["step_seconds"] for cell in scored)
        row["tokens"] = {str(cell["seed"]): cell["tokens"] for cell in scored}
    memory = results.of("memory", task, name, settings)
    if memory and "peak_bytes" in memory[-1]:
        row["peak_bytes"] = memory[-1]["peak_bytes"]
    return row


def _numbers(qualities: Sequence[float]) -> Row:
    """Mean and its standard error over seeds (sample deviation over the root of their number)."""
    spread = statistics.stdev(qualities) / math.sqrt(len(qualities)) if len(qualities) > 1 else None
    return {"quality": statistics.mean(qualities), "error": spread, "qualities": list(qualities)}


def uneven(rows: Mapping[str, Row]) -> str:
    """Return a complaint if methods saw different numbers of tokens under one seed; empty if the budget was equal."""
    by_seed: dict[str, set[int]] = {}
    for row in rows.values():
        for seed, tokens in row.get("tokens", {}).items():
            by_seed.setdefault(seed, set()).add(tokens)
    wrong = {seed: sorted(seen) for seed, seen in by_seed.items() if len(seen) > 1}
    return f"token budgets differ between methods: {wrong}" if wrong else ""


def table(summary: Mapping[str, Mapping[str, Row]]) -> str:
    """Return the results as lines of text."""
    lines = []
    for task, rows in summary.items():
        if not rows:
            continue
        lines += ["", f"{task}: {TASKS[task].what}"]
        head = f"  {'method':<26}{TASKS[task].metric:>11}{'± s.e.':>8}{'seeds':>6}{'rate':>9}"
        lines.append(f"{head}{'parameters':>12}{'+ head':>8}{'peak MB':>9}{'ms/step':>9}")
        lines += [_line(METHODS[name].what, row) for name, row in rows.items()]
        if complaint := uneven(rows):
            lines.append(f"  {complaint}")
    if any(row["at_edge"] for rows in summary.values() for row in rows.values()):
        lines += ["", "* the best rate is the smallest or largest tried; a better one may lie beyond"]
    return "\n".join(lines).strip("\n")


def _line(label: str, row: Row) -> str:
    rate = "diverged" if row["rate"] is None else f"{row['rate']:.1e}{'*' if row['at_edge'] else ' '}"
    if "quality" not in row:
        return f"  {label:<26}{'':>11}{'':>8}{0:>6}{rate:>9}"
    error = "" if row["error"] is None else f"{row['error']:.2f}"
    begin = f"  {label:<26}{row['quality']:>11.2f}{error:>8}{len(row['qualities']):>6}{rate:>9}"
    memory = f"{row['peak_bytes'] / 1e6:>9.0f}" if "peak_bytes" in row else " " * 9
    lost = f"  {row['diverged']} seeds diverged" if row["diverged"] else ""
    return f"{begin}{row['trainable']:>12,}{row['head']:>8,}{memory}{1000 * row['step_seconds']:>9.0f}{lost}"


def write(path: Path, summary: Mapping[str, Mapping[str, Row]], facts: Mapping[str, Any]) -> None:
    """Write the JSON in one piece and the plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({**facts, "tasks": summary}, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
    _plot(path.with_suffix(".png"), summary)


def _plot(path: Path, summary: Mapping[str, Mapping[str, Row]]) -> None:
    """One panel a task; a method that trains nothing beside the head is a line across."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = {
        task: {name: row for name, row in rows.items() if "quality" in row}
        for task, rows in summary.items()
    }
    shown = {task: rows for task, rows in shown.items() if rows}
    if not shown:
        return
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns + 1.6, 3.8 * lines), squeeze=False, layout="constrained"
    )
    colours = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(METHODS)}
    marks = {name: "osD^v<>PX*"[number % 10] for number, name in enumerate(METHODS)}
    labelled: dict[str, Any] = {}
    for panel, (task, rows) in zip(panels.flat, shown.items(), strict=False):
        counts: list[int] = []
        for name, row in rows.items():
            if row["trainable"]:
                place = row["trainable"] * 1.07 ** counts.count(row["trainable"])  # equal counts stand side by side
                counts.append(row["trainable"])
                drawn: Any = panel.errorbar(
                    place, row["quality"], yerr=row["error"] or 0.0, color=colours[name],
                    marker=marks[name], linestyle="none", capsize=3,
                )  # fmt: skip
            else:
                drawn = panel.axhline(row["quality"], color=colours[name], linestyle="--", linewidth=1)
            labelled[METHODS[name].what] = drawn
        panel.set_xscale("log")
        panel.set_xlabel("trainable parameters, a classifier's head apart (equal counts side by side)", fontsize=8)
        panel.set_ylabel(f"{TASKS[task].metric}, %" if TASKS[task].metric != "bleu" else "BLEU")
        panel.set_title(TASKS[task].what, fontsize=9)
    for panel in list(panels.flat)[len(shown) :]:
        panel.set_visible(False)
    figure.legend(list(labelled.values()), list(labelled), fontsize=7, loc="outside right upper")
    draft = path.with_name(path.stem + ".tmp.png")
    figure.savefig(draft, dpi=150)
    pyplot.close(figure)
    os.replace(draft, path)
