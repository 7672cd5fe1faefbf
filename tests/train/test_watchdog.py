"""Runs that cannot end well stop with a diagnosis, and what was good before stays good."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_recipe
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.errors import TrainingError
from sideroad.train import checkpoint, execution, finish
from sideroad.train.progress import Progress
from sideroad.train.run import train
from sideroad.train.watchdog import PATIENCE, StepReport, Watchdog

pytestmark = pytest.mark.usefixtures("quick_plots")


def poisoned(monkeypatch: pytest.MonkeyPatch, at_call: int, poison: Callable[[Tensor], Tensor]) -> None:
    """Let the `at_call`-th training micro-batch, counted from 0, have its loss changed."""
    honest, calls = execution.fast_loss, [0]

    def changed(model: nn.Module, *arguments: Any) -> Tensor:
        loss = honest(model, *arguments)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == at_call + 1:
                loss = poison(loss)
        return loss

    monkeypatch.setattr(execution, "fast_loss", changed)


def test_a_loss_that_is_nan_stops_the_run_with_a_diagnosis(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 7, lambda loss: loss * float("nan"))
    recipe = small_recipe(tmp_path, shared_model_dir, train={"validate_every": 3, "checkpoint_every": 2})
    with pytest.raises(TrainingError) as caught:
        train(recipe, tmp_path / "run")
    told = str(caught.value)
    assert told.startswith("step 4: the loss is not finite in micro-batch 1 (train.jsonl:")
    for part in (
        "Learning rate 0.00",
        "base in float32",
        "largest recent gradient norm",
        "step-00000003",
        "sideroad prev",
    ):
        assert part in told
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    newest = checkpoint.listed(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step-00000003"
    assert Adapter.load(newest / "adapter").parameters
    monkeypatch.undo()
    monkeypatch.setattr(finish, "loss_plot", lambda records, title: b"")
    assert train(recipe, tmp_path / "run", resume=True).steps == 6


def test_a_gradient_that_is_not_finite_is_told_apart(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sqrt at 0 has a finite value and an infinite slope.
    poisoned(monkeypatch, 2, lambda loss: loss + (loss - loss.detach()).sqrt())
    with pytest.raises(TrainingError, match=r"step 2: the loss is finite .* but the gradient is not, in .*q_proj\.\w"):
        train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run")


def test_a_first_gradient_that_is_not_finite_lists_parameters(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 0, lambda loss: loss + (loss - loss.detach()).sqrt())
    with pytest.raises(TrainingError, match="first backward pass: 9 problems") as caught:
        train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run")
    assert "model.layers.0.self_attn.q_proj.A got a gradient that is not finite" in str(caught.value)
    assert "and 20 more" in str(caught.value)


def test_a_validation_that_is_not_finite_stops_the_run(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution.Execution, "loss_of", lambda self, batch: torch.tensor(float("nan")))
    with pytest.raises(TrainingError, match="validation loss after step 0 is not finite"):
        train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run")


def watchdog(**parameters: nn.Parameter) -> Watchdog:
    return Watchdog(1000, "bfloat16", parameters)


def report(step: int, loss: float, norm: float = 1.0) -> StepReport:
    return StepReport(step, loss, [loss], [["train.jsonl:1"]], norm, 1e-3)


def test_every_parameter_without_a_gradient_is_listed() -> None:
    good, bare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    good.grad = torch.zeros(2)
    with pytest.raises(TrainingError, match=r"^b\.A got no gradient: .* Leave the layer out by adapter"):
        watchdog(**{"a.A": good, "b.A": bare}).check_gradients_exist()


def test_a_loss_that_runs_away_stops_after_some_steps() -> None:
    dog, progress = watchdog(), Progress()
    limit = math.log(1000) + 1
    progress = dog.check(report(1, 2.0), progress)
    for step in range(2, 2 + PATIENCE - 1):
        progress = dog.check(report(step, limit + 0.1), progress)
    with pytest.raises(TrainingError, match=r"the loss ran away: 8.008 nats, for 5 steps above 7.908.*Lower optim.lr"):
        dog.check(report(9, limit + 0.1), progress)
    assert dog.check(report(9, limit - 0.1), progress).hot_steps == 0


def test_a_run_that_begins_above_guessing_may_come_down() -> None:
    dog, progress = watchdog(), Progress()
    for step in range(1, 20):
        progress = dog.check(report(step, 12.0 - 0.05 * step), progress)
    assert progress.hot_steps == 0


def test_no_checkpoint_yet_is_said() -> None:
    with pytest.raises(TrainingError, match=r"There is no checkpoint yet.*base.dtype: float32"):
        watchdog().check(report(1, math.nan), Progress())


@pytest.mark.parametrize(
    ("step", "advice"), [(0, "it is the base: look for NaN in its weights"), (7, "Lower optim.lr")]
)
def test_a_validation_loss_that_is_not_finite_names_its_examples(step: int, advice: str) -> None:
    watchdog().check_validation(step, 1.0, ["validation.jsonl:1"])
    with pytest.raises(TrainingError) as caught:
        watchdog().check_validation(step, math.inf, ["validation.jsonl:2", "validation.jsonl:9"])
    told = str(caught.value)
    assert f"after step {step} is not finite, in validation.jsonl:2, validation.jsonl:9 (base in " in told
    assert advice in told
