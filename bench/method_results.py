"""Finished cells of `bench/methods.py`, one JSON object a line, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from method_sweep import Merit, rate_of
from method_table import ENCODER, Method
from method_tasks import HEAD_RATE, Budget, Task

Phase = Literal["sweep", "score", "memory"]
Cell = dict[str, Any]
"""A finished cell: what it was (`phase, task, method, half_decades, seed, settings`), and its numbers."""


def settings_of(task: Task, budget: Budget, method: Method) -> str:
    """Return a digest of all that decides a cell's numbers; a cell with another one is not used again."""
    decided = {
        "base": task.base,
        "source": asdict(task.source),
        "choose": task.choose,
        "budget": asdict(budget),
        "trains": method.trains,
        "adapter": dict(method.adapter),
        "optim": dict(method.optim),
        "head_rate": HEAD_RATE if task.kind == ENCODER else None,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]


class Results:
    """Cells on disk; those of other settings stay in the file and are not given."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: list[Cell] = []
        if path.exists():
            self._cells = [cell for line in path.read_text(encoding="utf-8").splitlines() if (cell := _parse(line))]

    def add(self, cell: Cell) -> None:
        """Append a cell to the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(cell) + "\n")
        self._cells.append(cell)

    def of(self, phase: Phase, task: str, method: str, settings: str) -> list[Cell]:
        """Return the cells of one phase of a method on a task."""
        wanted = {"phase": phase, "task": task, "method": method, "settings": settings}
        return [cell for cell in self._cells if all(cell.get(key) == value for key, value in wanted.items())]

    def seconds(self, phase: Phase, task: str) -> list[float]:
        """Return what cells of a phase of a task took."""
        return [cell["seconds"] for cell in self._cells if cell["phase"] == phase and cell["task"] == task]

    def machines(self) -> list[Mapping[str, Any]]:
        """Return the different machines and versions that the cells were run with."""
        found: list[Mapping[str, Any]] = []
        for cell in self._cells:
            if cell["machine"] not in found:
                found.append(cell["machine"])
        return found


def merits(cells: list[Cell], task: Task) -> dict[int, Merit]:
    """Return how good each rate of a sweep was, by half-decades."""
    return {cell["half_decades"]: _merit(cell, task) for cell in cells}


def rate_in(cell: Cell) -> float:
    """Return a cell's learning rate."""
    return rate_of(cell["half_decades"])


def _merit(cell: Cell, task: Task) -> Merit:
    if "failed" in cell:
        return ()
    found = cell["validation"]
    # of equal accuracies the lower loss
    return (-found["loss"],) if task.choose == "loss" else (found[task.choose], -found["loss"])


def _parse(line: str) -> Cell | None:
    """A line that was torn by a stop is as if it were not there."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "phase" in value else None
