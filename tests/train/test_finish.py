"""What a finished run leaves behind: curves, scores, samples, and an adapter that can travel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import CHANGING, small_recipe, step_losses

from sideroad.adapter import Adapter
from sideroad.train import events
from sideroad.train.recipe import load_recipe
from sideroad.train.run import train

METRICS = {
    "step", "loss", "lr", "grad_norm", "trained_tokens", "real_tokens", "computed_tokens", "seconds", "peak_bytes"
}  # fmt: skip


def test_a_run_learns_and_leaves_everything_behind(tmp_path: Path, shared_model_dir: Path) -> None:
    seen: list[events.Event] = []
    recipe = small_recipe(tmp_path, shared_model_dir, evaluate={"samples": 2, "metrics": ["json_valid"]})
    result = train(recipe, tmp_path / "run", on_event=seen.append)
    losses = step_losses(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.05
    assert result.last_validation_loss is not None
    assert result.first_validation_loss is not None
    assert result.last_validation_loss < result.first_validation_loss - 0.05
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert present >= {"recipe.yaml", "env.json", "metrics.jsonl", "checkpoints", "adapter", "loss.png", "samples.md"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == METRICS for line in lines if "loss" in line)
    assert [line["step"] for line in lines if set(line) == {"step", "validation_loss"}] == [0, 2, 4, 6]
    assert set(lines[-1]) == {"step", "validation_loss", "json_valid"}
    assert set(result.scores) == {"base", "adapted"}
    assert result.scores["adapted"]["loss"] == pytest.approx(result.last_validation_loss, rel=1e-5)
    assert result.scores["base"]["loss"] == pytest.approx(result.first_validation_loss, rel=1e-5)
    assert len(result.samples) == 2
    adapter = Adapter.load(result.adapter)
    assert adapter.base is not None
    assert adapter.base.sha256
    assert str(tmp_path) not in (result.adapter / "sideroad.json").read_text()
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    kinds = [type(event) for event in seen]
    assert kinds.index(events.Planned) < kinds.index(events.Validated) < kinds.index(events.StepDone)
    assert kinds[-1] is events.Finished
    planned = next(event for event in seen if isinstance(event, events.Planned))
    assert (planned.steps, planned.start, planned.examples) == (6, 0, 24)
    assert planned.trained_tokens == sum(line.get("trained_tokens", 0) for line in lines)
    assert planned.tokens == sum(line.get("real_tokens", 0) for line in lines)


def test_metrics_have_nothing_that_json_lacks(tmp_path: Path, shared_model_dir: Path) -> None:
    result = train(small_recipe(tmp_path, shared_model_dir, train={"max_steps": 2}), tmp_path / "run")

    def refuse(word: str) -> float:
        raise AssertionError(word)

    for path in (*result.run.glob("*.json*"), result.adapter / "sideroad.json"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)
    assert set(CHANGING) < METRICS
