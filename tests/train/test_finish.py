"""What a finished run leaves behind: curves, scores, samples, and an adapter that can travel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import CHANGING, small_recipe, step_losses

from sideroad.adapter import Adapter
from sideroad.train import evaluation, events, finish, steps
from sideroad.train.recipe import load_recipe
from sideroad.train.run import train
from sideroad.train.setup import NAME, prepare

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
    assert result.scores["adapted"]["loss"] == result.last_validation_loss
    assert result.scores["base"]["loss"] == result.first_validation_loss
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_losses_in_the_scores_are_those_of_validation_and_true_to_the_bit(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch, keep: str, packing: str, dtype: str
) -> None:
    recipe = small_recipe(
        tmp_path,
        shared_model_dir,
        base={"dtype": dtype},
        data={"packing": packing},
        train={"keep": keep, "max_steps": 4},
    )
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "mean_loss", None)
        # climbs from the third step on, so that the best step is not the last
        patch.setattr(steps, "factor", lambda config, step, total: 1.0 if step < 2 else -1.0)
        result = train(recipe, tmp_path / "run")
    assert (result.kept_step == result.steps) == (keep == "last")

    setup = prepare(recipe, None, offline=True, emit=lambda event: None)
    on = setup.material
    setup.attached.load(NAME, Adapter.load(result.adapter))

    def loss() -> float:
        run = on.execution
        on.model.eval()
        batches = [run.lay_out([on.validation_examples[index] for index in indices]) for indices in on.validation]
        with run.running(), torch.no_grad():
            return sum(float(run.loss_of(batch)) for batch in batches) / sum(batch.trained_tokens for batch in batches)

    assert result.scores["adapted"]["loss"] == loss()
    with setup.attached.disabled():
        assert result.scores["base"]["loss"] == loss()


def test_a_start_that_is_not_the_base_is_not_taken_for_it(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "starts_as_base", lambda init: False)
    taken = []
    honest = evaluation.mean_loss
    monkeypatch.setattr(evaluation, "mean_loss", lambda *a, **k: taken.append(1) or honest(*a, **k))
    result = train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run")
    assert taken == [1]
    assert result.first_validation_loss == pytest.approx(result.scores["base"]["loss"], rel=1e-5)
