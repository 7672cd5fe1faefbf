"""`sideroad inspect`: an adapter in numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import call
from tiny import fill, tiny_llama

from sideroad.attaching import attach
from sideroad.config import AdapterConfig


def saved(folder: Path, **method: Any) -> Path:
    """An adapter of q_proj and v_proj of the tiny model, with random values."""
    handle = attach(tiny_llama(), AdapterConfig(targets=("q_proj", "v_proj"), method=method), seed=0)
    fill(handle)
    for path, parameter in handle.parameters("default").items():
        if path.endswith("magnitude"):
            parameter.data = torch.linspace(0.5, 2.0, len(parameter))
        elif path.endswith("0.self_attn.q_proj.E"):
            parameter.data[1:] = 0
        elif path.endswith("1.self_attn.v_proj.E"):
            parameter.data[:] = 0
    handle.adapter("default").save(folder / "a")
    return folder / "a"


def test_it_tells_files_base_counts_and_ranks(run: Path) -> None:
    spoken = call("inspect", run / "adapter", "--all")
    assert spoken.code == 0, spoken.err
    for words in (
        "adapter_model.safetensors (",
        "tiny-llama, sha256 ",
        "lora, rank 4, alpha 16",
        "4,096 in 14 modules, float32",
        "effective rank",
        "model.layers.1.self_attn.q_proj",
    ):
        assert words in spoken.out
    report = json.loads(call("inspect", run, "--json").out)
    assert report["parameters"] == 4096
    assert all(module["norm"] > 0 and module["rank"] == 4 for module in report["modules"])


def test_it_refuses_pickles_and_broken_files(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "adapter", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    spoken = call("inspect", broken)
    assert spoken.code == 5
    assert "adapter_model.safetensors" in spoken.err
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    spoken = call("inspect", broken)
    assert spoken.code == 5
    assert "adapter_model.bin" in spoken.err


def test_it_says_what_it_found_instead(run: Path, tmp_path: Path) -> None:
    spoken = call("inspect", run / "metrics.jsonl")
    assert spoken.code == 5
    assert "is a file" in spoken.err
    (tmp_path / "notes.txt").write_text("x")
    spoken = call("inspect", tmp_path)
    assert spoken.code == 5
    assert "Found there: notes.txt" in spoken.err


def test_the_table_fits_80_columns(run: Path) -> None:
    heads = [line.split() for line in call("inspect", run, columns=80).out.splitlines() if line.startswith("layer")]
    assert " ".join(heads[0]) == "layer count rank parameters mean norm max norm effective rank"


@pytest.mark.parametrize(
    ("method", "words", "absent"),
    [
        ({"rank": 4}, ["lora, rank 4, alpha 16\n"], ["folded", "magnitudes", "ranks  ", "scaling"]),
        (
            {"kind": "dora", "rank": 4, "scaling": "alpha/sqrt(r)"},
            ["dora, rank 4, alpha 16, scaling alpha/sqrt(r)\n", "magnitudes   96 values, 0.5 to 2", "effective rank"],
            ["folded"],
        ),
        (
            {"rank": 4, "init": "pissa", "trains": "B", "dropout": 0.1},
            ["lora, rank 4, alpha 16, dropout 0.1, init pissa, trains B\n", "folded       pairs of rank 8"],
            ["magnitudes"],
        ),
        (
            {"kind": "adalora", "rank": 4, "target_rank": 2},
            ["ranks        1 to 4, sum 9 over 3 layers; 1 more have none\n"],
            ["folded"],
        ),
    ],
    ids=["plain", "dora", "pissa", "adalora"],
)
def test_what_is_not_the_default_is_said(
    method: dict[str, Any], words: list[str], absent: list[str], tmp_path: Path
) -> None:
    spoken = call("inspect", saved(tmp_path, **method), "--all")
    assert spoken.code == 0, spoken.err
    assert all(one in spoken.out for one in words), spoken.out
    assert not any(one in spoken.out for one in absent), spoken.out
    report = json.loads(call("inspect", tmp_path / "a", "--json").out)
    assert all((one["magnitude"] is not None) == (method.get("kind") == "dora") for one in report["modules"])
