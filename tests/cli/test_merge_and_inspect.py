"""`sideroad merge` and `sideroad inspect`: a plain model that answers alike, and an adapter in numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from terminal import call
from tiny import tiny_model_dir


def test_the_merged_model_answers_like_the_adapter(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    spoken = call("merge", run / "adapter", "--out", out)
    assert spoken.code == 0, spoken.err
    assert "task  weight 1, 14 layers, 4,096 parameters" in spoken.out
    assert "saved in float32" in spoken.out
    assert f"sideroad generate --base {out}" in spoken.out
    prompt = ("light in room 3", "--max-new-tokens", "6")
    assert call("generate", "--base", out, *prompt).out == call("generate", run, *prompt).out


def test_json_weights_and_dtype(run: Path, tmp_path: Path) -> None:
    spoken = call("merge", run, "--weights", "0.5", "--dtype", "bfloat16", "--out", tmp_path / "merged", "--json")
    assert spoken.code == 0, spoken.err
    report = json.loads(spoken.out)
    assert report["adapters"][0]["weight"] == 0.5
    assert (report["dtype"], report["modules"]) == ("bfloat16", 14)
    assert "model.safetensors" in report["files"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--weights", "1,2"], 2, "2 numbers for 1 adapters"),
        (["--weights", "much"], 2, "such as --weights 0.5,0.5"),
        (["--dtype", "float23"], 2, 'Did you mean "float32"?'),
        (["--base", "{other}"], 5, "was made for tiny-llama"),
    ],
)
def test_wrong_choices(run: Path, tmp_path: Path, options: list[str], code: int, words: str) -> None:
    other = tiny_model_dir(tmp_path, seed=1)
    given = [option.format(other=other) for option in options]
    spoken = call("merge", run, "--out", tmp_path / "merged", *given)
    assert spoken.code == code, spoken.err
    assert words in spoken.err
    assert not (tmp_path / "merged").exists()


def test_out_is_required(run: Path) -> None:
    spoken = call("merge", run)
    assert spoken.code == 2
    assert "--out" in spoken.err


def test_inspect_tells_files_base_counts_and_ranks(run: Path) -> None:
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


def test_inspect_refuses_pickles_and_broken_files(run: Path, tmp_path: Path) -> None:
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


def test_inspect_says_what_it_found_instead(run: Path, tmp_path: Path) -> None:
    spoken = call("inspect", run / "metrics.jsonl")
    assert spoken.code == 5
    assert "is a file" in spoken.err
    (tmp_path / "notes.txt").write_text("x")
    spoken = call("inspect", tmp_path)
    assert spoken.code == 5
    assert "Found there: notes.txt" in spoken.err
