"""Attaching, loading, switching and merging adapters: sideroad beside PEFT, interleaved.

    python bench/attach.py [--rounds 5] [--adapters 20]

`attach`: a new adapter of rank 16 on all linear layers of a Llama-2-7B-shaped model on the meta device (no weights, so
nothing but the work of attaching). `load` and `switch`: a random Llama of 12 small blocks with many adapters; the time
to load one more from its directory, and to let another one act, with the first and with the last of them. `merge` and
`unmerge`: rank 16 on all linear layers of SmolLM2-135M in fp32 (a download on first use); the first time, when every
page of the weights is written for the first time, and the median of the later ones. PEFT merges in place and subtracts
again; sideroad keeps the base's bytes, so that unmerging restores them exactly. Prints medians and ratios, and writes
one JSON file.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sideroad import Adapter, AdapterConfig, LoraMethod, __version__, attach, attached
from sideroad.base.config import BaseConfig
from sideroad.base.loading import load_base

ROOT = Path(__file__).resolve().parent.parent
Sides = dict[str, float]


def seconds(run: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def attaching(rounds: int) -> Sides:
    """Return the median seconds to put a new adapter on a 7B-shaped meta model, on both sides."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    taken: dict[str, list[float]] = {"peft": [], "ours": []}
    for _ in range(rounds):
        with torch.device("meta"):
            theirs = LlamaForCausalLM(LlamaConfig(**shape))
            ours = LlamaForCausalLM(LlamaConfig(**shape))
        config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        taken["peft"].append(seconds(lambda: get_peft_model(theirs, config, low_cpu_mem_usage=True)))  # noqa: B023
        taken["ours"].append(seconds(lambda: attach(ours, AdapterConfig(method=LoraMethod(rank=16)))))  # noqa: B023
    return {side: statistics.median(values) for side, values in taken.items()}


def small() -> LlamaForCausalLM:
    """Return a random Llama of many small layers."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()


def loading(adapters: int) -> dict[str, Sides]:
    """Return seconds to load and to switch with few and with many adapters, on both sides."""
    base = small()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "adapter")
        attach(copy.deepcopy(base), AdapterConfig()).adapter("default").save(place)
        theirs, ours = PeftModel.from_pretrained(copy.deepcopy(base), place, "0"), copy.deepcopy(base)
        attach(ours, Adapter.load(place), "0")
        taken: dict[str, dict[str, list[float]]] = {}
        for index in range(1, adapters + 1):
            name = str(index)
            load, switch = taken.setdefault("load", {}), taken.setdefault("switch", {})
            load.setdefault("peft", []).append(seconds(lambda: theirs.load_adapter(place, name)))  # noqa: B023
            load.setdefault("ours", []).append(seconds(lambda: attach(ours, Adapter.load(place), name)))  # noqa: B023
            handle = attached(ours)
            assert handle is not None
            switch.setdefault("peft", []).append(seconds(lambda: theirs.set_adapter(name)))  # noqa: B023
            switch.setdefault("ours", []).append(seconds(lambda: handle.activate(name)))  # noqa: B023
    edge = max(1, adapters // 4)
    found = {}
    for what, sides in taken.items():
        found[f"{what}, adapters 1-{edge}"] = {side: statistics.median(times[:edge]) for side, times in sides.items()}
        label = f"{what}, adapters {adapters - edge + 1}-{adapters}"
        found[label] = {side: statistics.median(times[-edge:]) for side, times in sides.items()}
    return found


def merging(rounds: int) -> dict[str, Sides]:
    """Return seconds to merge an adapter into SmolLM2-135M and to take it out again, on both sides."""
    ours = load_base(BaseConfig(model="smollm2-135m-instruct"), dtype=torch.float32).model
    handle = attach(ours, AdapterConfig(method=LoraMethod(rank=16)))
    theirs = load_base(BaseConfig(model="smollm2-135m-instruct"), dtype=torch.float32).model
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(theirs, config)
    taken: dict[str, dict[str, list[float]]] = {"merge": {"peft": [], "ours": []}, "unmerge": {"peft": [], "ours": []}}
    for _ in range(rounds + 1):
        taken["merge"]["peft"].append(seconds(wrapped.merge_adapter))
        taken["merge"]["ours"].append(seconds(handle.merge))
        taken["unmerge"]["peft"].append(seconds(wrapped.unmerge_adapter))
        taken["unmerge"]["ours"].append(seconds(handle.unmerge))
    found = {f"{what}, first": {side: times[0] for side, times in sides.items()} for what, sides in taken.items()}
    later = {side: statistics.median(times[1:]) for side, times in taken["merge"].items()}
    return {**found, "merge, later": later}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/attach.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    cells = {"attach, 7B on meta": attaching(options.rounds), **loading(options.adapters), **merging(options.rounds)}
    print(f"{'':<28}{'PEFT ms':>10}{'ours ms':>10}{'PEFT/ours':>11}")
    for name, sides in cells.items():
        theirs, ours = (sides[side] * 1e3 for side in ("peft", "ours"))
        print(f"{name:<28}{theirs:>10.2f}{ours:>10.3f}{theirs / ours:>10.1f}x")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    machine = {"sideroad": __version__, **versions, "load before and after": [load, os.getloadavg()[0]]}
    options.out.write_text(json.dumps({"machine": machine, "seconds": cells}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
