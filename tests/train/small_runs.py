"""Runs of a second on a tiny model, and how two of them are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import chat_rows, tiny_tokenizer, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from sideroad.config import validate
from sideroad.train.recipe import Recipe

CHANGING = ("seconds", "peak_bytes")
"""Keys of metrics.jsonl in which two equal runs differ."""


def small_recipe(folder: Path, model: Path, **sections: Mapping[str, Any]) -> Recipe:
    """A recipe of 6 steps over 24 chat rows: 3 an epoch, each of two micro-batches of 4; nothing is generated."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, dict[str, Any]] = {
        "base": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "adapter": {},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", chat_rows(24))),
            "validation": str(write_jsonl(folder / "validation.jsonl", chat_rows(6, start=100))),
        },
        "optim": {"lr": 1e-2, "batch_size": 4, "accumulate": 2, "schedule": "cosine"},
        "train": {"epochs": 2, "validate_every": 2, "checkpoint_every": 2},
        "evaluate": {"samples": 0},
    }
    for section, changes in sections.items():
        values[section].update(changes)
    return validate(Recipe, values, "test")


def tiny_gpt2_dir(folder: Path) -> Path:
    """A saved tiny GPT-2 (Conv1D layers, dropout of its own) with the byte tokenizer."""
    path = folder / "tiny-gpt2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=2
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def records(run: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl without what may differ between equal runs."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CHANGING} for line in lines]


def step_losses(run: Path) -> list[float]:
    """Training loss of each step."""
    return [record["loss"] for record in records(run) if "loss" in record]


def assert_same_run(run: Path, other: Path) -> None:
    """Fail unless metrics, adapter and last checkpoint (weights, optimizer, progress) agree bit for bit."""
    assert records(run) == records(other)
    for name in ("adapter_model.safetensors", "adapter_config.json", "sideroad.json"):
        assert (run / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes(), name
    last, other_last = (sorted((place / "checkpoints").iterdir())[-1] for place in (run, other))
    assert last.name == other_last.name
    mine, theirs = (load_file(path / "optimizer.safetensors") for path in (last, other_last))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    states = [json.loads((path / "state.json").read_text(encoding="utf-8")) for path in (last, other_last)]
    for state in states:
        del state["sha256"], state["progress"]["seconds"]
    assert states[0] == states[1]
