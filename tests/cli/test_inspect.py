"""`sideroad inspect`: an adapter in numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from terminal import call


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
