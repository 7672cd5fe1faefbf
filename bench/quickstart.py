"""The quick start's recipe trained by plain PEFT: what quality and time the same numbers give there.

    python bench/quickstart.py [--recipe examples/quickstart.yaml] [--run runs/quickstart] [--dtype bfloat16]

The PEFT side takes everything from the recipe (base, rows, order of the data, rank, alpha, rate, schedule, clipping)
and trains it as a plain user writes it: `get_peft_model`, batches padded on the right, the model's own loss. Both sides
are scored by the same code on the same validation set. With `--run`, the scores of a finished run stand beside.
Prints a table and writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from sideroad.base.loading import Base, load_base
from sideroad.config import LoraMethod
from sideroad.data.dataset import Loaded, load_data
from sideroad.data.encode import Encoded
from sideroad.errors import ConfigError
from sideroad.train.evaluation import evaluate
from sideroad.train.order import Order
from sideroad.train.recipe import Recipe, load_recipe
from sideroad.train.schedule import factor
from sideroad.train.seeds import derive

ROOT = Path(__file__).resolve().parent.parent


def padded(rows: list[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Return a right-padded batch with labels, as a collator makes it."""
    longest = max(len(row) for row in rows)
    kept = [[token if on else -100 for token, on in zip(row.ids, row.trained, strict=True)] for row in rows]
    return {
        "input_ids": torch.tensor([row.ids + [pad] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in kept]),
    }


def train_with_peft(base: Base, data: Loaded, recipe: Recipe) -> float:
    """Train a PEFT adapter on `base.model` in place; returns the seconds of the loop."""
    method, optim = recipe.adapter.method, recipe.optim
    if not isinstance(method, LoraMethod) or recipe.adapter.targets != "all-linear" or optim.accumulate != 1:
        raise ConfigError("this comparison knows plain LoRA on all-linear without accumulation only")
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules="all-linear",
        use_rslora=method.scaling == "alpha/sqrt(r)", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base.model, config)
    model.train()
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    groups = [
        {"params": [one for name, one in named.items() if part in name], "peak": optim.lr * ratio}
        for part, ratio in (("lora_A", 1.0), ("lora_B", optim.lr_ratio_b))
    ]
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.AdamW(groups, **settings)
    order = Order(data.train.lengths, optim, seed=derive(recipe.seed, "data"), packed=True)
    plan = list(order.steps(recipe.train))
    started = time.perf_counter()
    for step, batches in enumerate(plan):
        rows = [data.train.examples[index] for index in batches[0]]
        loss = model(**padded(rows, base.tokenizer.pad_token_id)).loss
        loss.backward()
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(named.values()), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor(optim, step, len(plan))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(f"PEFT step {step + 1}/{len(plan)}  loss {loss.item():.4f}", flush=True)
    return time.perf_counter() - started


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the results as text, one line a metric."""
    metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    lines = [f"{'':24}" + "".join(f"{name:>12}" for name in rows)]
    for metric in metrics:
        lines.append(f"{metric:24}" + "".join(f"{values.get(metric, float('nan')):12.4f}" for values in rows.values()))
    return "\n".join(lines)


def main() -> None:
    """Parse, train, score, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--run", type=Path, help="a finished run of the same recipe, to stand beside")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as the recipe says")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quickstart.json")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    base = load_base(recipe.base, dtype=getattr(torch, options.dtype) if options.dtype else None)
    data = load_data(recipe.data, base.tokenizer)
    if data.validation is None:
        raise ConfigError("the recipe has no validation set to score on")
    rows: dict[str, dict[str, float]] = {}
    if options.run:
        result: dict[str, Any] = json.loads((options.run / "result.json").read_text(encoding="utf-8"))
        rows = {
            "base": result["scores"]["base"],
            "sideroad": {**result["scores"]["adapted"], "loop seconds": result["seconds"]},
        }
    seconds = train_with_peft(base, data, recipe)
    scores = evaluate(base, data.validation, recipe.evaluate, recipe.data, seed=recipe.seed)
    rows["PEFT"] = {**scores.values, "loop seconds": seconds}
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"dtype": str(base.dtype), "threads": torch.get_num_threads(), "scores": rows}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
