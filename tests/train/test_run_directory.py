"""A run's files: strict JSON, one line per record, cut back to where a checkpoint stands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sideroad.errors import CheckpointError
from sideroad.train.run_directory import RunDirectory, to_json


def with_metrics(folder: Path, *rows: dict[str, Any], tail: str = "") -> RunDirectory:
    run = RunDirectory(folder)
    for row in rows:
        run.append_metrics(row)
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write(tail)
    return run


def kept(run: RunDirectory) -> list[tuple[int, bool]]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(row["step"], "loss" in row) for row in rows]


ROWS: list[dict[str, Any]] = [
    {"step": 0, "validation_loss": 3.0},
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.5},
    {"step": 2, "validation_loss": 1.6},
    {"step": 3, "loss": 1.2},
    {"step": 3, "validation_loss": 1.1, "exact_match": 0.5},
]


def test_a_directory_of_other_things_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    words = r"holds other things \(thesis.tex\). Give a new or empty directory"
    with pytest.raises(CheckpointError, match=words), RunDirectory(tmp_path).held(resume=False):
        pass


def test_nan_and_infinity_become_null() -> None:
    value = {"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": 0.1}
    assert json.loads(to_json(value)) == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": 0.1}


def test_metrics_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    run = with_metrics(tmp_path, *ROWS, tail='{"step": 4, "lo')
    run.cut_metrics(2, validated=2)
    assert kept(run) == [(0, False), (1, True), (2, True), (2, False)]


def test_a_validation_that_the_checkpoint_had_not_seen_goes(tmp_path: Path) -> None:
    run = with_metrics(tmp_path, *ROWS)
    run.cut_metrics(2, validated=0)
    assert kept(run) == [(0, False), (1, True), (2, True)]
    run.cut_metrics(0, validated=None)
    assert kept(run) == []


def test_scores_at_the_end_are_taken_again(tmp_path: Path) -> None:
    run = with_metrics(tmp_path, *ROWS)
    run.cut_metrics(3, validated=3)
    assert kept(run) == [(0, False), (1, True), (2, True), (2, False), (3, True)]


def test_lost_steps_are_told(tmp_path: Path) -> None:
    run = with_metrics(tmp_path, *ROWS)
    with pytest.raises(CheckpointError, match=r"has 3 of the 5 steps its checkpoint stands on"):
        run.cut_metrics(5, validated=2)
    (tmp_path / "other").mkdir()
    run = with_metrics(tmp_path / "other", ROWS[2])
    with pytest.raises(CheckpointError, match=r"line 1: step 2 where 1 belongs"):
        run.cut_metrics(2, validated=None)


def test_a_file_in_the_place_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"is a file; give another --run"),
        RunDirectory(tmp_path / "run").held(resume=False),
    ):
        pass


def test_broken_json_names_its_file(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.environment.write_text("{")
    with pytest.raises(CheckpointError, match=r"env.json is not valid JSON"):
        run.read_json(run.environment)
    assert run.read_json(run.result) is None


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path)
    for name in (".recipe.yaml.0a1b2c3d.tmp", ".env.json.00000000.tmp", ".loss.png.0a1b2c3d.tmp"):
        (tmp_path / name).write_text("half")
    for name in (".adapter.0a1b2c3d.tmp", ".adapter.0a1b2c3e.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("half")
    (tmp_path / ".notes.tmp").write_text("mine")
    with place.held(resume=False):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".notes.tmp"]


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"file/run cannot be made: Not a directory; give another --run"),
        RunDirectory(tmp_path / "file" / "run").held(resume=False),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_metrics_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RunDirectory(tmp_path)
    place.metrics.symlink_to("/dev/full")
    words = r"metrics\.jsonl cannot be written: .*What was there before is untouched"
    with pytest.raises(CheckpointError, match=words):
        place.append_metrics({"step": 1})
    with pytest.raises(CheckpointError, match=words):
        place.sync_metrics()
