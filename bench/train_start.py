"""Seconds from the start of a process to the end of its first training step, for sideroad and for TRL at its defaults.

`measure_start` runs this file in fresh processes, sides in turn. Both get the same encoded rows in a file, so neither
counts reading and tokenising: what remains is imports, the model, the adapter, what is decided about it, and the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SIDES = ("sideroad", "c")
ROUNDS = 3
DONE = "first step done"


def measure_start(batch: list[Any], directory: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return each side's seconds in every round, their medians, and how many times as long the peer takes.

    Args:
        batch: encoded rows of the first step.
        directory: where the base lies, or its hub id, for the peer; sideroad takes `options.base`.
    """
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        rows.write_text(json.dumps([vars(row) for row in batch]), encoding="utf-8")
        for _ in range(ROUNDS):
            for side in SIDES:
                base = options.base if side == "sideroad" else directory
                settings = ["--dtype", options.dtype, "--threads", str(options.threads), "--compile", options.compile]
                seconds[side].append(_until_first_step([side, str(rows), base, *settings]))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {"seconds": seconds, "medians": medians, "ratio": medians["c"] / medians["sideroad"]}


def _until_first_step(given: list[str]) -> float:
    started = time.perf_counter()
    command = [sys.executable, __file__, *given]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            assert process.stdout is not None
            taken = next((time.perf_counter() - started for line in process.stdout if line.strip() == DONE), None)
            process.communicate()
        if taken is None:
            said.seek(0)
            sys.exit(f"{given[0]} took no first step:\n{said.read().strip()}")
    return taken


def first_step_of_sideroad(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Load the base, attach an adapter, and take one step."""
    from sides import load, maker

    from sideroad.data.encode import Encoded

    batch = [Encoded(**row) for row in rows]
    with ExitStack() as stack:
        step, _ = maker("sideroad", options.compile == "on")(load(options.base, options.dtype), [batch], stack)
        step(0)


def first_step_of_trl(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The same with transformers and TRL alone."""
    from train_peers import trl_side
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    base = SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(options.base))
    with ExitStack() as stack:
        step, _ = trl_side(base, [[SimpleNamespace(**row) for row in rows]], stack)
        step(0)


def main() -> None:
    """Take the first step of one side, and say so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("rows", type=Path, help="encoded rows, as JSON")
    parser.add_argument("base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", choices=("on", "off"), default="off")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    {"sideroad": first_step_of_sideroad, "c": first_step_of_trl}[options.side](rows, options)
    print(DONE, flush=True)


if __name__ == "__main__":
    main()
