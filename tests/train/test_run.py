"""Whole runs on a tiny model: what they learn, leave behind, and refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import records, small_recipe, step_losses

from sideroad.adapter import Adapter
from sideroad.base.loading import Base, load_base
from sideroad.errors import CheckpointError, ConfigError, DataError, TrainingError
from sideroad.kernels import stand_ins
from sideroad.kernels.isolation import PackingRoute
from sideroad.train import events, loop, setup
from sideroad.train.execution import Execution
from sideroad.train.run import train

pytestmark = pytest.mark.usefixtures("quick_plots")


def test_the_same_seed_gives_the_same_files_and_another_does_not(tmp_path: Path, shared_model_dir: Path) -> None:
    torch.manual_seed(1)
    recipe = small_recipe(tmp_path, shared_model_dir, adapter={"method": {"kind": "lora", "dropout": 0.2}})
    first, second = (train(recipe, tmp_path / name) for name in ("one", "two"))
    torch.manual_seed(2)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    third = train(recipe.model_copy(update={"seed": 1}), tmp_path / "three")
    assert torch.equal(torch.rand(3), drawn)
    assert records(first.run) == records(second.run)
    weights = [result.adapter.joinpath("adapter_model.safetensors").read_bytes() for result in (first, second, third)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_the_base_stays_bit_for_bit(tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Base] = []

    def keeping(*arguments: Any, **named: Any) -> Base:
        kept.append(load_base(*arguments, **named))
        return kept[-1]

    monkeypatch.setattr(setup, "load_base", keeping)
    recipe = small_recipe(tmp_path, shared_model_dir)
    train(recipe, tmp_path / "run")
    fresh = load_base(recipe.base).model.state_dict()
    trained = kept[0].model.state_dict()
    assert all(torch.equal(trained[name], fresh[name]) for name in fresh)
    assert len(trained) > len(fresh)


def test_packed_rows_learn_what_padded_ones_do(tmp_path: Path, shared_model_dir: Path) -> None:
    sets = {"train": {"epochs": 1, "max_steps": 1}, "optim": {"batch_size": 24, "accumulate": 1}}
    packed = small_recipe(tmp_path, shared_model_dir, **sets)
    padded = small_recipe(tmp_path, shared_model_dir, data={"packing": "off"}, **sets)
    one, two = (train(recipe, tmp_path / name) for recipe, name in ((packed, "packed"), (padded, "padded")))
    first, second = (next(r for r in records(result.run) if "loss" in r) for result in (one, two))
    assert first["computed_tokens"] < first["real_tokens"] < second["computed_tokens"]  # beginnings shared, no padding
    assert second["computed_tokens"] > second["real_tokens"]
    assert first["loss"] == pytest.approx(second["loss"], rel=2e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=2e-5)


def test_accumulation_equals_one_batch(tmp_path: Path, shared_model_dir: Path) -> None:
    found = []
    for batch_size, accumulate in ((24, 1), (6, 4), (5, 5), (1, 24)):
        changes = {"batch_size": batch_size, "accumulate": accumulate, "clip_norm": None}
        recipe = small_recipe(tmp_path, shared_model_dir, optim=changes, train={"epochs": 1})
        result = train(recipe, tmp_path / f"run-{accumulate}")
        found.append(next(record for record in records(result.run) if "loss" in record))
    for other in found[1:]:
        assert other["trained_tokens"] == found[0]["trained_tokens"]
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=2e-5)
        assert other["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=2e-5)


def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    honest = stand_ins.gated_mlp

    def counting(*given: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return honest(*given)

    monkeypatch.setattr(stand_ins, "gated_mlp", counting)
    dropped = {"method": {"kind": "lora", "dropout": 0.3}}
    plain = small_recipe(tmp_path, shared_model_dir, adapter=dropped)
    lean = small_recipe(tmp_path, shared_model_dir, adapter=dropped, train={"gradient_checkpointing": True})
    losses, counts = [], []
    for recipe, name in ((plain, "plain"), (lean, "lean")):
        calls.clear()
        losses.append(step_losses(train(recipe, tmp_path / name).run))
        counts.append(sum(calls))
    assert losses[0] == losses[1]
    assert counts == [2 * 12, 2 * 12 * 2]


def test_fp16_trains_with_a_scaled_loss(tmp_path: Path, shared_model_dir: Path) -> None:
    recipe = small_recipe(tmp_path, shared_model_dir, base={"dtype": "float16"})
    losses = step_losses(train(recipe, tmp_path / "run").run)
    assert losses[-1] < losses[0]


def test_each_epoch_sees_every_example_once_in_an_order_of_its_own(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    honest = Execution.lay_out

    def spying(self: Execution, examples: Any) -> Any:
        seen.extend(example.source for example in examples)
        return honest(self, examples)

    monkeypatch.setattr(Execution, "lay_out", spying)
    train(small_recipe(tmp_path, shared_model_dir, data={"validation": None}), tmp_path / "run")
    first, second = seen[:24], seen[24:]
    assert sorted(first) == sorted(second) == sorted(f"train.jsonl:{line}" for line in range(1, 25))
    assert first != second


def test_max_steps_cuts_the_run_and_its_schedule(tmp_path: Path, shared_model_dir: Path) -> None:
    recipe = small_recipe(tmp_path, shared_model_dir, train={"max_steps": 4}, optim={"warmup_steps": 0})
    result = train(recipe, tmp_path / "run")
    rates = [record["lr"] for record in records(result.run) if "lr" in record]
    assert rates == pytest.approx([1e-2 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


def test_early_stopping_and_keeping_the_best(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = iter([5.0, 4.0, 4.5, 4.2, 3.0])
    monkeypatch.setattr(loop.Loop, "_validation_loss", lambda self: next(made_up))
    seen: list[events.Event] = []
    recipe = small_recipe(tmp_path, shared_model_dir, train={"validate_every": 1, "early_stopping": 2, "keep": "best"})
    result = train(recipe, tmp_path / "run", on_event=seen.append)
    assert (result.steps, result.stopped_early, result.best_step, result.kept_step) == (3, True, 1, 1)
    assert events.StoppedEarly(3, 1, 2) in seen
    best = Adapter.load(tmp_path / "run" / "checkpoints" / "step-00000001" / "adapter")
    last = Adapter.load(tmp_path / "run" / "checkpoints" / "step-00000003" / "adapter")
    kept = Adapter.load(result.adapter)
    assert kept.same_weights(best)
    assert not kept.same_weights(last)


def test_old_checkpoints_go_and_the_best_stays(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = iter([5.0, 4.0, 4.5, 4.5, 4.5, 4.5, 4.5])
    monkeypatch.setattr(loop.Loop, "_validation_loss", lambda self: next(made_up))
    recipe = small_recipe(tmp_path, shared_model_dir, train={"validate_every": 1, "checkpoint_every": 1})
    result = train(recipe, tmp_path / "run")
    assert sorted(path.name[-1] for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "5", "6"]
    assert (result.kept, result.kept_step, result.best_step) == ("last", 6, 1)


def test_packing_falls_back_with_its_reason_or_refuses(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "choose_route", lambda model: PackingRoute("none", "the test says so"))
    seen: list[events.Event] = []
    train(small_recipe(tmp_path, shared_model_dir), tmp_path / "auto", on_event=seen.append)
    assert any(isinstance(event, events.Note) and "the test says so" in event.text for event in seen)
    assert next(event for event in seen if isinstance(event, events.Planned)).packed is False
    with pytest.raises(TrainingError, match=r"data.packing: on .* the test says so"):
        train(small_recipe(tmp_path, shared_model_dir, data={"packing": "on"}), tmp_path / "on")


def test_a_second_run_in_one_directory_is_refused(tmp_path: Path, shared_model_dir: Path) -> None:
    recipe = small_recipe(tmp_path, shared_model_dir, train={"max_steps": 1})
    first = train(recipe, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"already holds a finished run.*--resume.*--run"):
        train(recipe, tmp_path / "run")
    seen: list[events.Event] = []
    assert train(recipe, tmp_path / "run", resume=True, on_event=seen.append) == first
    assert isinstance(seen[0], events.Note)
    assert "finished" in seen[0].text
    changed = small_recipe(tmp_path, shared_model_dir, train={"max_steps": 2})
    with pytest.raises(CheckpointError, match=r"recipe.train.max_steps: 1 in that run, 2 now"):
        train(changed, tmp_path / "run", resume=True)


def test_a_directory_in_use_is_refused(tmp_path: Path, shared_model_dir: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sideroad.train.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).held(resume=False): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid}"):
            train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()


def test_broken_data_is_refused_before_anything_is_written(tmp_path: Path, shared_model_dir: Path) -> None:
    recipe = small_recipe(tmp_path, shared_model_dir)
    (tmp_path / "train.jsonl").write_text('{"messages": []}\nnot json\n')
    with pytest.raises(DataError, match=r"train.jsonl"):
        train(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    small_recipe(tmp_path, shared_model_dir)
    train(recipe, tmp_path / "run")


def test_a_missing_tracker_is_refused_with_its_command(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = small_recipe(tmp_path, shared_model_dir, train={"trackers": ["wandb"]})
    with pytest.raises(ConfigError, match=r"pip install 'sideroad\[wandb\]'"):
        train(recipe, tmp_path / "run")
