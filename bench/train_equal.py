"""Whether the fast path trains as the plain path does: two loss curves over the same rows in the same order."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from cells import batches
from sides import load, sideroad_side

from sideroad.train.settings import TrainConfig

CELL = "quickstart"


def compare_paths(options: argparse.Namespace) -> dict[str, Any]:
    """Train on both paths from one seed, turn by turn; returns both loss curves and how far apart they come."""
    configs = {"plain": TrainConfig(fast=False), "fast": TrainConfig(compile=options.compile)}
    curves: dict[str, list[float]] = {path: [] for path in configs}
    steps, facts = {}, {}
    with ExitStack() as stack:
        for path, config in configs.items():
            base = load(options.base, options.dtype)
            given = batches(CELL, base.tokenizer, options.data, options.equal_steps)
            steps[path], facts[path] = sideroad_side(base, given, stack, config=config)
        for turn in range(options.equal_steps):
            for path, step in steps.items():
                curves[path].append(step(turn)[0])
            if (turn + 1) % 10 == 0:
                print(f"step {turn + 1}: plain {curves['plain'][-1]:.6f}  fast {curves['fast'][-1]:.6f}", flush=True)
    apart = [abs(fast - plain) / abs(plain) for plain, fast in zip(curves["plain"], curves["fast"], strict=True)]
    return {"cell": CELL, "largest_relative_difference": max(apart), **curves, "facts": facts}
