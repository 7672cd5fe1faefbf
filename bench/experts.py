"""Adapters on fused experts: sideroad beside PEFT, interleaved.

    python bench/experts.py [--rounds 5] [--experts 32] [--tokens 512]

A random Qwen3-MoE of two blocks (hidden 512, experts of 256, four for each token) with rank 8 on all experts' weights:
what a forward pass keeps for its backward pass (exact: storages that are not the model's own), and the time of both.
`summed` is sideroad made to add the changes to the weights first, as it does where it does not know how they are used.
Prints medians and ratios, and writes one JSON file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sideroad import AdapterConfig, LoraMethod, __version__, attach, seams

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def base(experts: int) -> nn.Module:
    """Return a random mixture in fp32."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "vocab_size": 1000, "num_experts": experts, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).train()


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes of what a forward pass saves, without the model's own parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(saved.values())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/experts.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    ids = torch.randint(1, 1000, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    ours = base(options.experts)
    attach(ours, AdapterConfig(targets=tuple(NAMES), method=LoraMethod(rank=8, alpha=16)))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=NAMES)
    theirs = get_peft_model(base(options.experts), config).train()
    sides = {"peft": (theirs, None), "summed": (ours, False), "ours": (ours, None)}
    kept: dict[str, int] = {}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for step in range(options.rounds + 1):
        for side, (model, products) in sides.items():
            choose = seams.multiplies if products is None else (lambda owner: False)
            with mock.patch.object(seams, "multiplies", choose):
                if step == 0:
                    kept[side] = kept_bytes(model, lambda: model(ids, labels=ids).loss)  # noqa: B023
                started = time.perf_counter()
                model(ids, labels=ids).loss.backward()
                model.zero_grad()
            if step:
                taken[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(times) for side, times in taken.items()}
    print(f"{'':<10}{'kept MB':>10}{'s':>10}{'PEFT/this':>12}{'':>8}")
    for side in sides:
        ratios = f"{kept['peft'] / kept[side]:>10.2f}x{medians['peft'] / medians[side]:>8.2f}x"
        print(f"{side:<10}{kept[side] / 1e6:>10.1f}{medians[side]:>10.3f}{ratios}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    machine = {"sideroad": __version__, **versions, "load before and after": [load, os.getloadavg()[0]]}
    fastest = {side: min(times) for side, times in taken.items()}
    found = {"machine": machine, "kept_bytes": kept, "seconds": medians, "fastest": fastest}
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
