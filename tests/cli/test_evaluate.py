"""`sideroad evaluate`: base against adapted, on the recipe's validation set or another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from terminal import call
from tiny import chat_rows, tiny_model_dir, write_jsonl


def test_a_run_is_scored_as_at_its_end(run: Path) -> None:
    spoken = call("evaluate", run, "--json")
    assert spoken.code == 0, spoken.err
    found = json.loads(spoken.out)
    recorded = json.loads((run / "result.json").read_text())["scores"]
    for who in ("base", "adapted"):
        assert found[who]["loss"] == pytest.approx(recorded[who]["loss"], rel=1e-5)
        assert found[who]["answered"] == 4
    assert found["adapted"]["loss"] < found["base"]["loss"]
    assert len(found["samples"]) == 2


def test_table_and_samples_for_people(run: Path) -> None:
    spoken = call("evaluate", run / "adapter", "--metrics", "exact_match,chrf", "--samples", "1", "--limit", "3")
    assert spoken.code == 0, spoken.err
    assert "exact match" in spoken.out
    assert "chrF2" in spoken.out
    assert "JSON parses" not in spoken.out
    assert "over 3 answers" in spoken.out
    assert spoken.out.count("music in room 16") == 1


def test_an_empty_source_is_not_the_recipes_own(run: Path) -> None:
    spoken = call("evaluate", run, "--data", "")
    assert spoken.code == 2
    assert "a source is empty" in spoken.err


def test_other_rows(run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "more.jsonl", chat_rows(3, start=50))
    found = json.loads(call("evaluate", run, "--data", rows, "--json").out)
    assert found["data"]["examples"] == 3
    assert found["samples"][0]["source"] == "more.jsonl:1"


def test_an_adapter_alone_asks_for_base_and_data(run: Path, place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run / "adapter", moved)
    spoken = call("evaluate", moved)
    assert spoken.code == 2
    assert "validation.jsonl is not here" in spoken.err
    spoken = call("evaluate", moved, "--data", place / "validation.jsonl", "--offline")
    assert spoken.code == 4
    assert "tiny-llama" in spoken.err
    spoken = call("evaluate", moved, "--data", place / "validation.jsonl", "--base", place / "tiny-llama")
    assert spoken.code == 0, spoken.err


def test_another_base_is_warned_about(run: Path, tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path, seed=1)
    spoken = call("evaluate", run, "--base", other)
    assert spoken.code == 0, spoken.err
    assert "was made for tiny-llama" in spoken.err


def test_wrong_metric_and_unknown_place(run: Path) -> None:
    spoken = call("evaluate", run, "--metrics", "exct_match")
    assert spoken.code == 2
    assert 'Did you mean "exact_match"?' in spoken.err
    spoken = call("evaluate", run.parent / "tusk")
    assert spoken.code == 5
    assert 'no run or adapter at' in spoken.err
    assert 'Did you mean "task"?' in spoken.err
