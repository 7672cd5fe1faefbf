"""A training step with DoRA beside one with LoRA, here and in PEFT, interleaved in one process.

    python bench/dora.py [--rows 2] [--length 256] [--rank 8] [--rounds 5]

SmolLM2-135M, all linear layers, fp32, rows of one length, every token trained, AdamW. Sides: sideroad on its fast
path and on its plain one, PEFT. PEFT forms B A for every layer and step; sideroad takes the norm from W Aᵀ. Prints
medians and ratios, and writes one JSON file.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW

from sideroad import AdapterConfig, LoraMethod, __version__, attach
from sideroad.base.config import BaseConfig
from sideroad.base.loading import load_base
from sideroad.config import DoraMethod
from sideroad.data.encode import Encoded
from sideroad.kernels.isolation import choose_route
from sideroad.train.choosing import choose_execution
from sideroad.train.settings import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], None]


def ours(ids: torch.Tensor, rank: int, *, dora: bool, fast: bool) -> Step:
    """Return a training step of sideroad's."""
    base = load_base(BaseConfig(model="smollm2-135m-instruct"), dtype=torch.float32)
    kind = DoraMethod if dora else LoraMethod
    handle = attach(base.model, AdapterConfig(method=kind(rank=rank, alpha=2 * rank)), seed=0)
    model = base.model.train()
    made = choose_execution(model, choose_route(model), TrainConfig(fast=fast, compile="off"), pad_id=0, share=False)
    rows = [Encoded(tuple(row), (True,) * len(row), "") for row in ids.tolist()]
    optimizer = AdamW(handle.parameters("default").values(), 1e-4)

    def step() -> None:
        with made.running():
            batch = made.lay_out(rows)
            (made.loss_of(batch) / batch.trained_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(ids: torch.Tensor, rank: int, *, dora: bool) -> Step:
    """Return a training step of PEFT's."""
    base = load_base(BaseConfig(model="smollm2-135m-instruct"), dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config).train()
    optimizer = AdamW([one for one in model.parameters() if one.requires_grad], 1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2), ("length", 256), ("rank", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/dora.json")
    options = parser.parse_args()
    ids = torch.randint(10, 40_000, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    sides: dict[str, Step] = {
        "PEFT, LoRA": theirs(ids, options.rank, dora=False),
        "PEFT, DoRA": theirs(ids, options.rank, dora=True),
        "sideroad plain, DoRA": ours(ids, options.rank, dora=True, fast=False),
        "sideroad, DoRA": ours(ids, options.rank, dora=True, fast=True),
        "sideroad, LoRA": ours(ids, options.rank, dora=False, fast=True),
    }
    load = os.getloadavg()[0]
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds + 1):
        for name, step in sides.items():
            started = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - started)
            gc.collect()
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    print(f"{options.rows} x {options.length} tokens, rank {options.rank}, {torch.get_num_threads()} threads")
    for name, seconds in medians.items():
        print(f"{name:<22}{seconds:>8.2f} s  {seconds / medians['PEFT, LoRA']:>6.2f}x the time of PEFT's LoRA")
    print(f"DoRA: PEFT takes {medians['PEFT, DoRA'] / medians['sideroad, DoRA']:.2f}x the time of sideroad")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    machine = {"sideroad": __version__, **versions, "load before and after": [load, os.getloadavg()[0]]}
    shape = {name: getattr(options, name) for name in ("rows", "length", "rank", "rounds")}
    report = {"machine": machine, "shape": shape, "seconds": medians}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
