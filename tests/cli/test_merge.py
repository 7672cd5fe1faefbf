"""`sideroad merge`: a plain model that answers alike."""

from __future__ import annotations

import json
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
