"""Methods of fine-tuning beside each other, each at the learning rate that suits it best.

    python bench/methods.py [--tasks banking77 rte] [--methods lora dora] [--only sweep] [--data DIR] [--quick]

Every method sees the same rows in the same order for the same number of steps. Its rate is chosen on held-out rows of
train, in half-decades around the entry's centre, going on where an edge is best, under seed 0; then it is trained under
seeds 1 to 3, which no choice has seen, and scored on test. Peak memory comes from a process of its own: the largest
batches of the run, above the loaded model, from attaching to the third step. Step times are medians of wall time.

Cells are kept in a file as they finish, and a second run goes on from there (`--only report` runs nothing). Prints a
table, writes one JSON and a plot of quality against trainable parameters. `--quick` has tiny budgets: it shows that all
of it works, in 10 minutes, and says nothing about the methods.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import environment
import method_report
import torch
from method_causal import CausalRuns
from method_encoder import EncoderRuns
from method_memory import measure_memory
from method_results import Cell, Phase, Results, merits, settings_of
from method_sweep import AROUND, EXTRA, best_rate, next_rate, rate_of
from method_table import ENCODER, METHODS, refusal
from method_tasks import MINILM, QUICK_METHODS, QUICK_TASKS, ROOT, SMOLLM, TASKS, Budget, missing

from sideroad.errors import TrainingError

RESULTS = ROOT / "bench/results"
PHASES: tuple[Phase, ...] = ("sweep", "score", "memory")
SWEEP_SEED, SEEDS, QUICK_SEEDS = 0, (1, 2, 3), (1, 2)
QUICK_MINUTES = 9.0
"""After this a quick run begins no further cell."""
MEMORY_SECONDS = 20.0
"""About what a measurement of memory takes."""


@dataclass
class Bench:
    """What is asked for, what is there, and how much time is left.

    Attributes:
        until: moment of `time.monotonic` after which no cell begins.
    """

    options: argparse.Namespace
    budgets: dict[str, Budget]
    methods: list[str]
    results: Results
    machine: dict[str, Any]
    until: float
    out_of_time: bool = False

    def run(self) -> None:
        """Run every cell that is wanted and not there yet."""
        for task in self.budgets:
            opened: list[EncoderRuns | CausalRuns] = []
            for method in self.methods_of(task):
                for phase in self.options.only:
                    self._run_phase(phase, task, method, opened)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs that are scored."""
        return QUICK_SEEDS if self.options.quick else SEEDS

    def methods_of(self, task: str) -> list[str]:
        """Return the methods that are compared on a task."""
        return [method for method in self.methods if method in TASKS[task].methods]

    def wanted(self, phase: Phase, task: str, method: str) -> Iterator[tuple[int, int]]:
        """Give (half-decades, seed) of each cell still to be run; a sweep's next one depends on those before."""
        settings = settings_of(TASKS[task], self.budgets[task], METHODS[method])

        def found(of: Phase) -> list[Cell]:
            return self.results.of(of, task, method, settings)

        if phase == "sweep":
            extra = 0 if self.options.quick else EXTRA
            centre = METHODS[method].centre[TASKS[task].kind]
            while (at := next_rate(merits(found("sweep"), TASKS[task]), centre, extra)) is not None:
                yield at, SWEEP_SEED
        elif phase == "score":
            best = best_rate(merits(found("sweep"), TASKS[task]))
            done = {(cell["half_decades"], cell["seed"]) for cell in found("score")}
            if best is not None:
                yield from ((best, seed) for seed in self.seeds if (best, seed) not in done)
        elif not found("memory"):
            yield METHODS[method].centre[TASKS[task].kind], SWEEP_SEED

    def expected_seconds(self) -> float:
        """Return about how long the cells take that are not there yet, sweeps without extensions."""
        total = 0.0
        for task in self.budgets:
            share = self.budgets[task].steps / TASKS[task].budget.steps
            nominal = max(10.0, TASKS[task].seconds * share)
            for phase in self.options.only:
                taken = self.results.seconds(phase, task)
                each = median(taken) if taken else MEMORY_SECONDS if phase == "memory" else nominal
                total += each * sum(self._missing(phase, task, method) for method in self.methods_of(task))
        return total

    def _missing(self, phase: Phase, task: str, method: str) -> int:
        settings = settings_of(TASKS[task], self.budgets[task], METHODS[method])
        done = len(self.results.of(phase, task, method, settings))
        return max(0, {"sweep": 2 * AROUND + 1, "score": len(self.seeds), "memory": 1}[phase] - done)

    def _run_phase(self, phase: Phase, task: str, method: str, opened: list[EncoderRuns | CausalRuns]) -> None:
        for half_decades, seed in self.wanted(phase, task, method):
            if time.monotonic() > self.until:
                self.out_of_time = True
                return
            started = time.perf_counter()
            if phase == "memory":
                numbers = {"peak_bytes": memory_of(task, method, self.options)}
            else:
                if not opened:
                    opened.append(open_task(task, self.budgets[task], self.options.data))
                numbers = _guarded(opened[0], method, half_decades, seed, phase)
            what = {"phase": phase, "task": task, "method": method, "half_decades": half_decades, "seed": seed}
            settings = settings_of(TASKS[task], self.budgets[task], METHODS[method])
            seconds = time.perf_counter() - started
            self.results.add({**what, "settings": settings, **numbers, "seconds": seconds, "machine": self.machine})
            left = _shown(self.expected_seconds())
            told = _told(f"{task} {method}", phase, rate_of(half_decades), seed, numbers)
            print(f"{told} ({seconds:.0f} s; {left} left)", flush=True)


def open_task(task: str, budget: Budget, data: Path) -> EncoderRuns | CausalRuns:
    """Read and encode a task's rows."""
    return (EncoderRuns if TASKS[task].kind == ENCODER else CausalRuns)(TASKS[task], budget, data)


def memory_of(task: str, method: str, options: argparse.Namespace) -> int:
    """Measure the peak of memory in a process of its own."""
    command = [sys.executable, __file__, "--memory", "--tasks", task, "--methods", method]
    command += ["--threads", str(options.threads), "--data", str(options.data), *(["--quick"] if options.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"measuring the memory of {method} on {task} failed:\n{done.stderr.strip()}")
    return int(done.stdout.strip().splitlines()[-1])


def _guarded(runs: EncoderRuns | CausalRuns, method: str, half_decades: int, seed: int, phase: Phase) -> dict[str, Any]:
    """A run that diverges is a finding about its rate."""
    try:
        return runs.cell(METHODS[method], rate_of(half_decades), seed, score=phase == "score")
    except TrainingError as error:
        if "got no gradient" in str(error):
            raise
        return {"failed": str(error).partition("\n")[0]}


def _told(what: str, phase: Phase, rate: float, seed: int, numbers: dict[str, Any]) -> str:
    if phase == "memory":
        return f"{what}: peak {numbers['peak_bytes'] / 1e6:.0f} MB above the model"
    found = numbers.get("test") or numbers.get("validation")
    shown = numbers["failed"] if found is None else ", ".join(f"{key} {value:.4g}" for key, value in found.items())
    return f"{what} at {rate:.1e}, seed {seed}, {'test' if phase == 'score' else 'held out'}: {shown}"


def _shown(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"about {minutes} min"


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="what to train on; default: all, quick: a few")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="what to compare; default: all, quick: a few")
    parser.add_argument("--only", nargs="+", choices=(*PHASES, "report"), default=list(PHASES), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="tiny budgets, no extension of sweeps, 10 minutes")
    parser.add_argument("--minutes", type=float, help="begin no cell after this many; a later run goes on")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="sets that are not committed")
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/methods.json, methods_quick.json")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.only = [phase for phase in PHASES if phase in options.only]
    options.out = options.out or RESULTS / ("methods_quick.json" if options.quick else "methods.json")
    options.tasks = options.tasks or list(QUICK_TASKS if options.quick else TASKS)
    options.methods = options.methods or list(QUICK_METHODS if options.quick else METHODS)
    if options.quick and options.minutes is None:
        options.minutes = QUICK_MINUTES
    return options


def main() -> None:
    """Run what is missing of what was asked for, and report."""
    began = time.monotonic()
    options = read_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(options.threads)
    chosen = {name: task for name, task in TASKS.items() if name in options.tasks}
    budgets = {name: task.quick if options.quick else task.budget for name, task in chosen.items()}
    if options.memory:
        ((task, budget),) = budgets.items()
        print(measure_memory(open_task(task, budget, options.data), METHODS[options.methods[0]], TASKS[task].base))
        return
    for name in list(budgets):
        if (absent := missing(name, options.data)) is not None:
            print(f"{name} is skipped: there is no {absent.name} in {absent.parent.name} of the data directory")
            del budgets[name]
    methods = []
    for name in METHODS:
        if name in options.methods and (reason := refusal(name)) is not None:
            print(f"{name} is skipped: {reason}")
        elif name in options.methods:
            methods.append(name)
    machine = environment.machine(options.threads, f"{MINILM}, {SMOLLM}", "float32", compiled=False)
    until = began + 60 * options.minutes if options.minutes is not None else float("inf")
    bench = Bench(options, budgets, methods, Results(options.out.with_suffix(".jsonl")), machine, until)
    print(f"{len(methods)} methods, {len(budgets)} tasks: {_shown(bench.expected_seconds())} of runs", flush=True)
    try:
        bench.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
    report(bench)


def report(bench: Bench) -> None:
    """Print the table and write the JSON and the plot."""
    summary = method_report.summarise(bench.results, bench.budgets, list(METHODS))
    machines = bench.results.machines()
    print(f"\n{method_report.table(summary)}")
    if len(machines) > 1:
        print(f"\ncells come from {len(machines)} machines or versions: their times do not compare")
    if bench.out_of_time:
        print(f"\nthe {bench.options.minutes:g} minutes are over; the same command goes on from here")
    facts = {"machines": machines, "sweep_seed": SWEEP_SEED, "seeds": bench.seeds, "quick": bench.options.quick}
    method_report.write(bench.options.out, summary, facts)
    print(f"\nwritten to {bench.options.out.name} and its plot")


if __name__ == "__main__":
    main()
