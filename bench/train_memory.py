"""Peak memory of a side of `bench/train.py`: one fresh process per side and cell, above the loaded model."""

from __future__ import annotations

import argparse
import gc
import importlib
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from cells import batches, padded_tokens, real_tokens
from resident import peak_bytes, restart_peak
from sides import SIDES, arrange, load, maker

TRAIN = Path(__file__).with_name("train.py")
LARGEST = 3
"""Batches that are taken for their padded size; one more for its real tokens. They set a run's peak."""


def measure_memory(side: str, cell: str, options: argparse.Namespace) -> int:
    """Return the bytes that the largest batches of one side need at their peak, above the model and the side's code."""
    base = load(options.base, options.dtype)
    timed = batches(cell, base.tokenizer, options.data, options.warm_up + options.steps)[options.warm_up :]
    given = arrange(side, timed, 0)
    largest = [*sorted(given, key=padded_tokens)[-LARGEST:], max(given, key=real_tokens)]
    for module in SIDES[side].modules:
        importlib.import_module(module)
    gc.collect()
    # weights are mapped from their file and come into memory when first read: until then they would count as the side's
    for parameter in base.model.parameters():
        parameter.sum()
    before = restart_peak()
    with ExitStack() as stack:
        step, _ = maker(side, options.compile == "on")(base, largest, stack)
        for turn in range(len(largest)):
            step(turn)
    return max(0, peak_bytes() - before)


def memory_of(side: str, cell: str, options: argparse.Namespace) -> int:
    """Run `measure_memory` in a process of its own."""
    kept = ("base", "dtype", "steps", "warm_up", "threads", "compile", "data")
    settings = [part for name in kept for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    command = [sys.executable, str(TRAIN), "--memory", side, "--cells", cell, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"measuring the memory of {side} on {cell} failed:\n{done.stderr.strip()}")
    return int(done.stdout.strip().splitlines()[-1])
