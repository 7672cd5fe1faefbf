"""sideroad's training step beside a bare PEFT loop and TRL: same rows, base and dtype, interleaved in one process.

    python bench/train.py [--cells quickstart] [--sides a c sideroad] [--compiled] [--steps 9] [--start] [--equal]

Sides train LoRA of rank 8 on all linear layers: `a` is the loop that a plain user of PEFT writes, on padded random
batches; `b` the same with rows sorted by length; `c` TRL's SFTTrainer at its defaults; `d1` and `d2` TRL in full
precision with padding_free and with packing; `sideroad` the step that `sideroad train` takes. On every batch each side
takes its step in turn, in rotating order. Real tokens are those that are not padding, with multiplicity also where
sideroad computes a common beginning once. Peak memory comes from one fresh process per side and cell, above the model.

Prints a table and the bars of speed and memory, and writes one JSON and one plot; cells measured earlier on the same
machine, versions and settings stay in them. `--start` times processes up to their first step, `--equal` compares the
losses of the fast path with those of the plain one. Run it on a quiet machine; differences under 8 % are noise.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import environment
import torch
import train_report
from cells import CELLS, ROOT, batches, missing, padded_tokens, real_tokens
from sides import DTYPES, SIDES, arrange, load, maker
from train_equal import CELL as EQUAL_CELL
from train_equal import compare_paths
from train_memory import measure_memory, memory_of
from train_peers import Step
from train_start import measure_start

from sideroad.base.config import BaseConfig
from sideroad.base.loading import load_tokenizer
from sideroad.base.locate import locate

RESULTS = ROOT / "bench/results"
Turn = tuple[float, int, float]
"""Loss, real tokens and seconds of a step."""


def time_cell(name: str, options: argparse.Namespace) -> train_report.Cell:
    """Time the sides on one cell; a peer that refuses it is left out, with its reason."""
    count = options.warm_up + options.steps
    tokenizer = load_tokenizer(BaseConfig(model=options.base))
    given = batches(name, tokenizer, options.data, count)
    steps: dict[str, Step] = {}
    facts: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        for side in options.sides:
            try:
                own = arrange(side, given, options.warm_up)
                make = maker(side, options.compile == "on")
                steps[side], facts[side] = make(load(options.base, options.dtype), own, stack)
            except Exception as error:  # whatever a peer raises on what is asked of it is its refusal
                if not SIDES[side].peer:
                    raise
                left_out[side] = _reason(side, error)
        measured = _interleave(steps, count, left_out)
    timed = given[options.warm_up :]
    return {
        "what": CELLS[name].what,
        "real_tokens": statistics.mean(map(real_tokens, timed)),
        "padded_tokens": statistics.mean(map(padded_tokens, timed)),
        "timed_steps": options.steps,
        "sides": {side: _numbers(turns, options.warm_up, facts[side]) for side, turns in measured.items()},
        "left_out": left_out,
    }


def _numbers(turns: list[Turn], warm_up: int, facts: dict[str, Any]) -> dict[str, Any]:
    timed = turns[warm_up:]
    return {
        "seconds": [taken for _, _, taken in timed],
        "real_tokens": [real for _, real, _ in timed],
        "first_loss": turns[0][0],
        "facts": facts,
    }


def _interleave(steps: dict[str, Step], count: int, left_out: dict[str, str]) -> dict[str, list[Turn]]:
    """Take every turn on every side, the order rotating; a peer that fails goes to `left_out`."""
    measured: dict[str, list[Turn]] = {side: [] for side in steps}
    for turn in range(count):
        order = list(measured)
        first = turn % len(order)
        for side in order[first:] + order[:first]:
            started = time.perf_counter()
            try:
                loss, real = steps[side](turn)
            except Exception as error:  # see above
                if not SIDES[side].peer:
                    raise
                left_out[side] = _reason(side, error)
                del measured[side]
                continue
            measured[side].append((loss, real, time.perf_counter() - started))
    return measured


def _reason(side: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    print(f"{side} ({SIDES[side].what}) is left out: {reason}", flush=True)
    return reason


def measure_cell(name: str, options: argparse.Namespace) -> train_report.Cell:
    """Measure speed and memory of one cell and print them."""
    cell = time_cell(name, options)
    gc.collect()  # the sides' models refer to themselves; several cells of them would fill the memory
    if not options.no_memory:
        for side, one in cell["sides"].items():
            one["peak_bytes"] = memory_of(side, name, options)
    train_report.complete(cell)
    sizes = f"{cell['real_tokens']:.0f} real of {cell['padded_tokens']:.0f} padded tokens a step"
    print(f"\n{name}: {cell['what']}; {sizes}\n{train_report.table({name: cell})}", flush=True)
    _compare_first_losses(cell["sides"])
    if disturbed := train_report.disturbed(cell):
        print(disturbed, flush=True)
    return cell


def _compare_first_losses(sides: dict[str, dict[str, Any]]) -> None:
    """Show that the sides train the same tokens: adapters begin as nothing, so the first losses are one number."""
    if "sideroad" not in sides:
        return
    ours = sides["sideroad"]["first_loss"]
    others = [side for side in sides if side not in ("sideroad", "d2")]  # d2 begins with other rows
    apart = [f"{side} {abs(sides[side]['first_loss'] / ours - 1):.1e}" for side in others]
    print(f"first loss apart from sideroad's (relative): {', '.join(apart)}", flush=True)


def measure_first_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Time processes up to their first step and print that."""
    tokenizer = load_tokenizer(BaseConfig(model=options.base))
    (batch,) = batches("quickstart", tokenizer, options.data, 1)
    found = measure_start(batch, locate(BaseConfig(model=options.base)).target, options)
    ours, theirs = found["medians"]["sideroad"], found["medians"]["c"]
    print(f"\nfirst step done after: sideroad {ours:.1f} s, {SIDES['c'].what} {theirs:.1f} s: {found['ratio']:.2f}x")
    return found


def measure_equality(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the loss curves of plain and fast path and print how far apart they come."""
    found = compare_paths(options)
    apart = found["largest_relative_difference"]
    print(f"\n{options.equal_steps} steps on {EQUAL_CELL}: losses of fast and plain path differ by at most {apart:.1e}")
    return found


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="what to measure")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="who takes part; default: all but the compiled one")
    parser.add_argument("--compiled", action="store_true", help="add sideroad with compiled pieces as a side")
    parser.add_argument("--compile", choices=("off", "on"), default="off", help="pieces of the side `sideroad`")
    parser.add_argument("--steps", type=int, default=9, help="timed steps per side and cell")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base, on every side")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="named model, hub id or directory")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="sets that are not committed")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--start", action="store_true", help="only: time processes up to their first step")
    parser.add_argument("--equal", action="store_true", help="only: compare losses of fast and plain path")
    parser.add_argument("--equal-steps", type=int, default=100, help="steps of that comparison")
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/train.json")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    chosen = options.sides or [side for side in SIDES if side != "sideroad-compiled"]
    options.sides = [side for side in SIDES if side in chosen or (side == "sideroad-compiled" and options.compiled)]
    if options.out is None:
        options.out = RESULTS / ("train.json" if options.dtype == "float32" else f"train_{options.dtype}.json")
    return options


def main() -> None:
    """Measure what was asked for."""
    options = read_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(options.memory, options.cells[0], options))
        return
    environment.enter()
    load_tokenizer(BaseConfig(model=options.base))  # fetches a missing base before anything is timed
    header = environment.machine(options.threads, options.base, options.dtype, compiled=options.compile == "on")
    found = train_report.read_kept(options.out, header)
    if options.start:
        found["start"] = measure_first_steps(options)
    if options.equal:
        found["equal"] = measure_equality(options)
    if options.start or options.equal:
        train_report.write(options.out, found)
        return
    for name in options.cells:
        if (absent := missing(name, options.data)) is not None:
            print(f"{name} is skipped: there is no {absent.name} in {absent.parent.name} of the data directory")
            continue
        found["cells"][name] = measure_cell(name, options)
        train_report.write(options.out, found)
    versions = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    verdicts = train_report.verdicts(found["cells"])
    print(f"\n{versions}\n\n{train_report.table(found['cells'])}\n\n{train_report.bars(verdicts)}")
    print(f"\nwritten to {options.out.name} and its plot")


if __name__ == "__main__":
    main()
