"""sideroad's training step beside a bare PEFT loop: same rows, same base, same dtype, interleaved in one process.

    python bench/train.py [--dtype bfloat16] [--steps 9] [--cells quickstart] [--base NAME]

The PEFT side is what a plain user writes: the Hugging Face model, `get_peft_model` with rank 8 on all linear layers,
batches padded on the right, labels, AdamW. The sideroad side is the step that `sideroad train` takes. Peak memory comes
from one fresh process per side and cell, above what was resident once the model was loaded. Prints a table and writes
one JSON file. Run it on a quiet machine; under 8 % is noise.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sideroad import __version__
from sideroad.attaching import attach
from sideroad.base.config import BaseConfig
from sideroad.base.loading import Base, load_base, load_tokenizer
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.data.batches import collate, plan_epoch
from sideroad.data.config import DataConfig
from sideroad.data.dataset import load_data
from sideroad.data.encode import Encoded
from sideroad.kernels.isolation import choose_route, packing
from sideroad.train.progress import Progress
from sideroad.train.settings import OptimConfig
from sideroad.train.steps import Stepper
from sideroad.train.watchdog import Watchdog

ROOT = Path(__file__).resolve().parent.parent
CELLS = {
    "1x512": "one sequence of 512 tokens, all trained",
    "2x512": "two sequences of 512 tokens, all trained",
    "quickstart": "quick start rows through the chat template, random batches of 8",
    "quickstart-sorted": "the same rows, batches of 8 of similar length",
}
SIDES = ("peft", "sideroad")
RANK, ALPHA, RATE = 8, 16, 1e-4
WARM_UP = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Rows = Sequence[Encoded]
Step = Callable[[Rows], float]
"""Takes one optimizer step on a batch; returns its mean loss."""


def peft_side(base: Base, _steps: int, _stack: ExitStack) -> Step:
    """A bare PEFT loop, as its documentation teaches it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    pad = base.tokenizer.pad_token_id

    def step(rows: Rows) -> float:
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row.ids + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        kept = [[token if on else -100 for token, on in zip(row.ids, row.trained, strict=True)] for row in rows]
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in kept])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def sideroad_side(base: Base, steps: int, stack: ExitStack) -> Step:
    """The step of `sideroad train`: packed where the model keeps sequences apart, loss only where there is a label."""
    route = choose_route(base.model)
    stack.enter_context(packing(base.model, route))
    handle = attach(base.model, AdapterConfig(method=LoraMethod(rank=RANK, alpha=ALPHA)), seed=0)
    parameters = handle.parameters("default")
    dtype = str(base.dtype).removeprefix("torch.")
    watchdog = Watchdog(base.model.config.vocab_size, dtype, parameters)
    optim = OptimConfig(lr=RATE, schedule="constant", warmup_ratio=0.0)
    stepper = Stepper(base.model, parameters, optim, watchdog, steps=steps, seed=0)
    state = {"progress": Progress()}

    def step(rows: Rows) -> float:
        batch = collate(rows, packed=route.isolates, pad_id=base.tokenizer.pad_token_id)
        prepared = stepper.prepare(state["progress"], [batch], [[row.source for row in rows]])
        stepper.apply(prepared)
        state["progress"] = prepared.progress
        return prepared.loss

    return step


MAKERS: dict[str, Callable[[Base, int, ExitStack], Step]] = {"peft": peft_side, "sideroad": sideroad_side}


def batches(cell: str, tokenizer: Any, count: int) -> list[list[Encoded]]:
    """Return `count` batches of a cell, the same on every call."""
    examples = load_data(DataConfig(train=str(ROOT / "examples/quickstart/train.jsonl")), tokenizer).train.examples
    if "x" in cell:
        rows, length = (int(part) for part in cell.split("x"))
        tokens = [token for example in examples for token in example.ids]
        marks = [False] + [True] * (length - 1)
        pieces = [Encoded(tokens[at : at + length], marks, "text") for at in range(0, count * rows * length, length)]
        return [pieces[at : at + rows] for at in range(0, count * rows, rows)]
    lengths = [len(example) for example in examples]
    plan = plan_epoch(lengths, batch_size=8, seed=0, group_by_length=cell.endswith("sorted"))
    return [[examples[index] for index in batch] for batch in plan[:count]]


def load(arguments: argparse.Namespace) -> Base:
    """Load the base in the dtype asked for."""
    return load_base(BaseConfig(model=arguments.base), dtype=DTYPES[arguments.dtype])


def time_cell(cell: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both sides on one cell, alternating which goes first."""
    with ExitStack() as stack:
        bases = {side: load(arguments) for side in SIDES}
        given = batches(cell, bases["peft"].tokenizer, arguments.steps + WARM_UP)
        steps = {side: MAKERS[side](bases[side], len(given), stack) for side in SIDES}
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        losses: dict[str, list[float]] = {side: [] for side in SIDES}
        for index, rows in enumerate(given):
            for side in SIDES if index % 2 else reversed(SIDES):
                started = time.perf_counter()
                losses[side].append(steps[side](rows))
                seconds[side].append(time.perf_counter() - started)
    gc.collect()
    real = [sum(len(row) for row in rows) for rows in given][WARM_UP:]
    padded = [len(rows) * max(len(row) for row in rows) for rows in given][WARM_UP:]
    timed = {side: seconds[side][WARM_UP:] for side in SIDES}
    result: dict[str, Any] = {
        "what": CELLS[cell],
        "real_tokens": statistics.mean(real),
        "padded_tokens": statistics.mean(padded),
        "speed_ratio": statistics.median(p / s for p, s in zip(timed["peft"], timed["sideroad"], strict=True)),
    }
    for side in SIDES:
        result[side] = {
            "tokens_per_second": statistics.median(n / s for n, s in zip(real, timed[side], strict=True)),
            "seconds": timed[side],
            "first_loss": losses[side][0],
        }
    return result


def measure_memory(side: str, cell: str, arguments: argparse.Namespace) -> int:
    """Return the bytes that three steps of one side need above the loaded model, at their peak."""
    base = load(arguments)
    given = batches(cell, base.tokenizer, arguments.steps + WARM_UP)
    # The three largest of the timed batches: a run's peak is set by them.
    largest = sorted(given, key=lambda rows: len(rows) * max(len(row) for row in rows))[-3:]
    gc.collect()
    before = _restart_peak()
    with ExitStack() as stack:
        step = MAKERS[side](base, 3, stack)
        for rows in largest:
            step(rows)
    return max(0, _peak_bytes() - before)


def memory_of(side: str, cell: str, arguments: argparse.Namespace) -> int:
    """Run `measure_memory` in a process of its own."""
    options = ["--memory", side, "--cells", cell, "--dtype", arguments.dtype, "--base", arguments.base]
    command = [sys.executable, __file__, *options, "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"measuring the memory of {side} on {cell} failed:\n{done.stderr.strip()}")
    return int(done.stdout.strip().splitlines()[-1])


def _restart_peak() -> int:
    """Set the process's peak back to what it holds now, where the system can, and return that in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    if Path("/proc/self/status").exists():
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the versions and the machine that the numbers belong to."""
    packages = ("torch", "transformers", "peft")
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "sideroad": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "base": arguments.base,
        "dtype": arguments.dtype,
        "timed_steps": arguments.steps,
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as lines of text."""
    head = f"{'cell':<19}{'real/padded':>13}{'PEFT tok/s':>12}{'ours tok/s':>12}{'speed':>8}"
    lines = [head + f"{'PEFT MB':>10}{'ours MB':>9}{'memory':>8}"]
    for name, cell in found["cells"].items():
        ours, peft = cell["sideroad"], cell["peft"]
        sizes = f"{cell['real_tokens']:.0f}/{cell['padded_tokens']:.0f}"
        speeds = f"{peft['tokens_per_second']:>12.0f}{ours['tokens_per_second']:>12.0f}{cell['speed_ratio']:>7.2f}x"
        memory = ""
        if "peak_bytes" in ours:
            megabytes = [side["peak_bytes"] / 1e6 for side in (peft, ours)]
            memory = f"{megabytes[0]:>10.0f}{megabytes[1]:>9.0f}{cell['memory_ratio']:>7.2f}x"
        lines.append(f"{name:<19}{sizes:>13}{speeds}{memory}")
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="what to measure")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base, on both sides")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="named model, hub id or directory")
    parser.add_argument("--steps", type=int, default=9, help="timed steps per side and cell")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/train.json", help="where the JSON goes")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every cell asked for."""
    arguments = read_arguments()
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("bench/train.py compares with PEFT, which is not installed. Install it: pip install -e '.[dev]'")
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(measure_memory(arguments.memory, arguments.cells[0], arguments))
        return
    load_tokenizer(BaseConfig(model=arguments.base))  # fetches a missing base before anything is timed
    found: dict[str, Any] = {"machine": machine(arguments), "cells": {}}
    for name in arguments.cells:
        cell = time_cell(name, arguments)
        if not arguments.no_memory:
            for side in SIDES:
                cell[side]["peak_bytes"] = memory_of(side, name, arguments)
            cell["memory_ratio"] = cell["sideroad"]["peak_bytes"] / max(1, cell["peft"]["peak_bytes"])
        found["cells"][name] = cell
        print(table({"cells": {name: cell}}), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draft = arguments.out.with_suffix(".tmp")
    draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, arguments.out)
    versions = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    print(f"\n{versions}\n\n{table(found)}\n\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
