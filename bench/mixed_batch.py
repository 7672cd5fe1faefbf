"""A batch whose rows use different adapters: sideroad's `rows` beside PEFT's `adapter_names`, interleaved.

    python bench/mixed_batch.py [--dtype bfloat16] [--rounds 9] [--adapters 1 2 4 8]

A random Llama, eight rows, rank 8 on all linear layers, the same tensors on both sides; logits are compared before
anything is timed. In each round every side runs once, in turn: PEFT's mixed batch, ours, and ours as a loop that runs
each adapter's rows by themselves. Rows of one adapter lie together (`sorted`) or take turns (`mixed`). PEFT's mixed
batch does not train, so the step with a backward compares ours with our loop. Prints median times and the median and
quartiles of the rounds' ratios, and writes one JSON file. Run it on a quiet machine; where there is none, `--clock cpu
--threads 1` counts the CPU time of the process, which neighbours disturb less.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sideroad import AdapterConfig, Attached, LoraMethod, __version__, attach

ROOT = Path(__file__).resolve().parent.parent
ROWS, RANK, ALPHA = 8, 8, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Run = Callable[[], Any]
Measured = dict[str, dict[str, dict[str, float]]]
"""What was run → side → its numbers."""


def both_sides(options: argparse.Namespace, names: list[str]) -> tuple[Any, Attached]:
    """Return PEFT's model and our handle: one random base, the same adapters on all linear layers."""
    torch.manual_seed(0)
    fields = {"vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": options.layers}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=9, num_key_value_heads=3))
    model = model.to(DTYPES[options.dtype]).eval()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(model), config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        theirs.add_adapter(name, config, autocast_adapter_dtype=False)
    method = LoraMethod(rank=RANK, alpha=ALPHA)
    handle = attach(model, AdapterConfig(method=method, dtype="base"), names[0], seed=0)
    for seed, name in enumerate(names[1:], start=1):
        attach(model, AdapterConfig(method=method, dtype="base"), name, seed=seed)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name in names:
            for place, parameter in handle.parameters(name).items():
                path, _, part = place.rpartition(".")
                parameter.normal_(std=0.02)
                parameters[f"base_model.model.{path}.lora_{part}.{name}.weight"].copy_(parameter)
    theirs.eval()
    return theirs, handle


def measure(sides: dict[str, Run], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return each side's median seconds, and the quartiles of how many times as long it took as ours in its round."""
    clock = CLOCKS[options.clock]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(options.rounds + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            started = clock()
            sides[name]()
            if turn:  # the first round warms up
                seconds[name].append(clock() - started)
    found = {}
    for name, values in seconds.items():
        found[name] = {"seconds": statistics.median(values)}
        if name != "ours":
            ratios = [theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)]
            quartiles = statistics.quantiles(ratios, method="inclusive")
            found[name] |= dict(zip(("lower", "ratio", "upper"), quartiles, strict=True))
    return found


def cell(theirs: Any, handle: Attached, rows: list[str], ids: Tensor, options: argparse.Namespace) -> Measured:
    """Measure one batch: forward on three sides, forward and backward on ours."""
    places = {name: [row for row, one in enumerate(rows) if one == name] for name in dict.fromkeys(rows)}

    def peft() -> Tensor:
        return theirs(input_ids=ids, adapter_names=rows).logits  # type: ignore[no-any-return]

    def ours() -> Tensor:
        with handle.rows(rows):
            return handle.model(ids).logits  # type: ignore[no-any-return]

    def loop() -> Tensor:
        found = torch.empty(0)
        for name, where in places.items():
            with handle.using(name):
                part = handle.model(ids[where]).logits
            found = part.new_empty(len(rows), *part.shape[1:]) if not found.numel() else found
            found[where] = part
        return found

    def step() -> None:
        ours().float().square().mean().backward()

    def step_loop() -> None:
        for name, where in places.items():
            with handle.using(name):
                handle.model(ids[where]).logits.float().square().mean().backward()

    with torch.inference_mode():
        largest = float((peft() - ours()).abs().max() / ours().abs().max())
        forward = measure({"peft": peft, "ours": ours, "loop": loop}, options)
    limit = 1e-4 if handle.model.dtype == torch.float32 else 5e-2
    assert largest < limit, f"the sides differ by {largest}"
    backward = measure({"ours": step, "loop": step_loop}, options)
    handle.model.zero_grad()
    return {"forward": forward, "forward and backward": backward}


def table(cells: dict[str, Measured]) -> str:
    """Return the results as lines of text: milliseconds, and times as long as ours (middle half of the rounds)."""
    compared = (("forward", "peft"), ("forward", "loop"), ("forward and backward", "loop"))
    head = f"{'adapters, rows':<16}{'ours ms':>9}{'PEFT':>22}{'loop':>22}{'step ms':>9}{'loop of steps':>22}"
    lines = [head]
    for name, found in cells.items():
        shown = []
        for part, side in compared:
            one = found[part][side]
            shown.append(f"{one['ratio']:.2f}x ({one['lower']:.2f}-{one['upper']:.2f})")
        forward, step = (found[part]["ours"]["seconds"] * 1e3 for part in ("forward", "forward and backward"))
        lines.append(f"{name:<16}{forward:>9.0f}{shown[0]:>22}{shown[1]:>22}{step:>9.0f}{shown[2]:>22}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8], help="different adapters in a batch")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of base and adapters, on both sides")
    parser.add_argument("--tokens", type=int, default=32, help="of each row")
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mixed_batch.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    names = [f"adapter{index}" for index in range(max(options.adapters))]
    theirs, handle = both_sides(options, names)
    handle.set_trainable(names)
    ids = torch.randint(0, 4096, (ROWS, options.tokens))
    cells = {}
    for count in options.adapters:
        turns = [names[row % count] for row in range(ROWS)]
        for kind, rows in {"sorted": sorted(turns), "mixed": turns}.items():
            if kind == "sorted" or sorted(turns) != turns:
                cells[f"{count}, {kind}"] = cell(theirs, handle, rows, ids, options)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    machine: dict[str, Any] = {
        "sideroad": __version__,
        **versions,
        "python": platform.python_version(),
        "threads": options.threads,
    }
    machine["load before and after"] = [load, os.getloadavg()[0]]
    settings = {name: getattr(options, name) for name in ("dtype", "tokens", "layers", "rounds", "clock")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine, "settings": settings, "cells": cells}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{machine}\n{settings}\n\n{table(cells)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
