"""`sideroad preview`: marks, statistics, findings and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from terminal import call, write_recipe
from tiny import chat_rows, tiny_model_dir, write_jsonl

from sideroad.cli.preview import _print_sample
from sideroad.data.preview import PreviewSample


def test_trained_tokens_stand_in_brackets_where_there_is_no_colour(place: Path) -> None:
    spoken = call("preview", place / "task.yaml", "-n", "2")
    assert spoken.code == 0, spoken.err
    assert spoken.out.count('⟦{"intent"') == 2
    assert "<|im_end|>⟧" in spoken.out
    assert "⟦<|im_start|>user" not in spoken.out
    assert "length min / median / p95 / max" in spoken.out
    assert "note: train.jsonl: chat" in spoken.out


def test_colour_replaces_brackets_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = PreviewSample("a.jsonl:1", (("ask ", False), ("tell\x1b[2J", True)), 2, 1)
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = Console(force_terminal=True, color_system="standard", width=80, record=True)
    with console.capture() as coloured:
        _print_sample(console, sample)
    assert "⟦" not in coloured.get()
    assert "\x1b[1;32mtell␛[2J" in coloured.get()
    plain = Console(force_terminal=True, no_color=True, width=80)
    with plain.capture() as bare:
        _print_sample(plain, sample)
    assert "ask ⟦tell␛[2J⟧" in bare.get()


def test_json_has_samples_statistics_and_findings(place: Path) -> None:
    shown = json.loads(call("preview", place / "task.yaml", "-n", "1", "--json").out)
    (sample,) = shown["samples"]
    assert sum(run["trained"] for run in sample["runs"]) == 1
    assert shown["train"]["sequences"] == 16
    assert shown["validation"]["rows"] == 4
    assert {finding["severity"] for finding in shown["findings"]} == {"note"}


def test_error_findings_exit_3_after_showing_everything(tmp_path: Path) -> None:
    tiny_model_dir(tmp_path)
    recipe = write_recipe(tmp_path, data={"overlong": "error", "max_length": 20})
    spoken = call("preview", recipe)
    assert spoken.code == 3
    assert "error: " in spoken.out
    assert "above max_length 20" in spoken.out


def test_broken_rows_are_named_by_line(tmp_path: Path) -> None:
    tiny_model_dir(tmp_path)
    recipe = write_recipe(tmp_path)
    path = write_jsonl(tmp_path / "train.jsonl", chat_rows(2))
    path.write_text(path.read_text() + "{broken\n")
    spoken = call("preview", recipe)
    assert spoken.code == 3
    assert "train.jsonl" in spoken.err
    assert "3" in spoken.err
