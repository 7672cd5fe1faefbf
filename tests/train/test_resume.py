"""A run stopped anywhere and resumed equals one never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import assert_same_run, records, small_recipe, tiny_gpt2_dir
from tiny import file_size_limit, tiny_model_dir

from sideroad.errors import AdapterError, CheckpointError
from sideroad.train import events, steps
from sideroad.train.interrupts import Interrupted
from sideroad.train.recipe import Recipe, dump_recipe
from sideroad.train.run import train
from sideroad.train.steps import Stepper

pytestmark = pytest.mark.usefixtures("quick_plots")


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2_dir(tmp_path_factory.mktemp("gpt2"))


def recipe_for(folder: Path, model: Path, **sections: Any) -> Recipe:
    """Dropout, accumulation with a short last step in each epoch, and the best kept."""
    changes = {
        "adapter": {"method": {"kind": "lora", "dropout": 0.2}},
        "optim": {"batch_size": 3, "accumulate": 3, "lr_ratio_b": 4},
        "train": {"epochs": 2, "validate_every": 2, "checkpoint_every": 3, "keep": "best"},
    }
    for section, values in sections.items():
        changes.setdefault(section, {}).update(values)
    return small_recipe(folder, model, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shared_model_dir: Path) -> tuple[Recipe, Path]:
    """A recipe of 6 steps and its run without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = recipe_for(folder, shared_model_dir)
    return recipe, train(recipe, folder / "run").run


def stopping_at(what: Callable[[events.Event], bool], error: BaseException) -> Callable[[events.Event], None]:
    def on_event(event: events.Event) -> None:
        if what(event):
            raise error

    return on_event


def step_is(step: int) -> Callable[[events.Event], bool]:
    return lambda event: isinstance(event, events.StepDone) and event.step == step


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_an_interrupt_after_a_step_changes_nothing(tmp_path: Path, straight: tuple[Recipe, Path], step: int) -> None:
    recipe, whole = straight
    with pytest.raises(Interrupted, match=f"interrupted after step {step};.*--resume with --run") as caught:
        train(recipe, tmp_path / "run", on_event=stopping_at(step_is(step), KeyboardInterrupt()))
    assert caught.value.exit_code == 130
    assert caught.value.checkpoint.name == f"step-{step:08d}"
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_an_interrupt_in_the_middle_of_a_step_loses_that_step_only(
    tmp_path: Path, straight: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = straight
    honest = Stepper.prepare

    def interrupted(self: Stepper, progress: Any, batches: Any, sources: Any) -> Any:
        prepared = honest(self, progress, batches, sources)
        if progress.step == 3:
            raise KeyboardInterrupt
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "prepare", interrupted)
        with pytest.raises(Interrupted, match="after step 3"):
            train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("kind", [events.Validated, events.Checkpointed, events.Evaluating])
def test_an_interrupt_between_steps_changes_nothing(
    tmp_path: Path, straight: tuple[Recipe, Path], kind: type[events.Event]
) -> None:
    recipe, whole = straight
    on_event = stopping_at(lambda event: isinstance(event, kind), KeyboardInterrupt())
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", on_event=on_event)
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_how_often_checkpoints_are_written_may_change(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, whole = straight
    changes = {"checkpoint_every": 1, "keep_checkpoints": 1}
    often = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", on_event=stopping_at(step_is(2), KeyboardInterrupt()))
    train(often, tmp_path / "run", resume=True)
    assert records(tmp_path / "run") == records(whole)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_run_stopped_at_every_step_ends_the_same(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, whole = straight
    for step in range(1, 7):
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "run", resume=True, on_event=stopping_at(step_is(step), KeyboardInterrupt()))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_an_error_of_the_watcher_leaves_a_resumable_run(
    tmp_path: Path, straight: tuple[Recipe, Path], step: int
) -> None:
    recipe, whole = straight
    with pytest.raises(RuntimeError, match="mine"):
        train(recipe, tmp_path / "run", on_event=stopping_at(step_is(step), RuntimeError("mine")))
    assert len([record for record in records(tmp_path / "run") if "loss" in record]) == step
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"packing": "off"}},
        {"optim": {"batch_size": None, "batch_tokens": 300, "schedule": "wsd"}},
        {"train": {"gradient_checkpointing": True, "early_stopping": 1, "validate_every": 1}},
        {"adapter": {"bias": "all", "method": {"kind": "lora", "dropout": 0.1, "init": "gaussian"}}},
        {"base": {"dtype": "bfloat16"}},
    ],
    ids=["padded", "tokens", "checkpointing", "bias", "bf16"],
)
def test_it_holds_for_gpt2_with_dropout_of_its_own(tmp_path: Path, gpt2_dir: Path, sections: dict[str, Any]) -> None:
    recipe = recipe_for(tmp_path, gpt2_dir, **sections)
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", on_event=stopping_at(step_is(2), KeyboardInterrupt()))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


KILLING = """
import os, random, signal, sys, time
import matplotlib.figure, transformers.models.llama.modeling_llama
from sideroad.train import events, loop
from sideroad.train.recipe import load_recipe
from sideroad.train.run import train

recipe, home, seed, kills = load_recipe(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
honest = loop.checkpoint._sha256
loop.checkpoint._sha256 = lambda path: (time.sleep(0.02), honest(path))[1]  # so that many kills meet a checkpoint
moments = random.Random(seed)
runs, killed, number = 1, 0, 0
while killed < kills:
    if os.path.exists(os.path.join(home, str(runs), "result.json")):
        runs += 1
    number += 1
    how = signal.SIGINT if number % 10 == 2 else signal.SIGKILL
    reader, writer = os.pipe()
    child = os.fork()  # torch has computed nothing yet, so it has no threads to lose
    if child == 0:
        began = []
        def tell(event):
            began.extend([event] if isinstance(event, events.Planned) else [])
            os.write(writer, b"." if began else b"")
        try:
            train(recipe, os.path.join(home, str(runs)), resume=True, on_event=tell)
        finally:
            os._exit(0)
    os.close(writer)
    for _ in range(moments.randint(1, 7)):
        os.read(reader, 1)
    time.sleep(moments.uniform(0.0, 0.1))
    os.kill(child, how)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    os.close(reader)
print(runs)
"""


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 50, marks=pytest.mark.all)])
def test_kills_at_any_moment_change_nothing(
    tmp_path: Path, straight: tuple[Recipe, Path], seed: int, kills: int
) -> None:
    """One run is killed and resumed until it is done, then the next; the last is resumed once more here."""
    recipe, whole = straight
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    arguments = [str(tmp_path / "recipe.yaml"), str(tmp_path / "runs"), str(seed), str(kills)]
    command = [sys.executable, "-c", KILLING, *arguments]
    told = subprocess.run(command, check=True, timeout=600, stdout=subprocess.PIPE, text=True).stdout
    runs = sorted((tmp_path / "runs").iterdir(), key=lambda run: int(run.name))
    assert len(runs) == int(told.split()[-1])
    if not (runs[-1] / "result.json").exists():
        train(recipe, runs[-1], resume=True)
    for run in runs:
        assert_same_run(run, whole)
        assert everything_in(run) == everything_in(whole)


@pytest.mark.parametrize(
    ("size", "what"),
    [(300, "recipe.yaml"), (20_000, "step-00000000.*adapter"), (60_000, "step-00000002"), (0, "recipe.yaml")],
)
def test_a_full_disk_is_told_and_costs_nothing(
    tmp_path: Path, straight: tuple[Recipe, Path], size: int, what: str
) -> None:
    recipe, whole = straight
    words = rf"{what} cannot be written: File too large\. What was there before is untouched"
    with file_size_limit(size), pytest.raises((CheckpointError, AdapterError), match=words):
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)
    assert everything_in(tmp_path / "run") == everything_in(whole)


def everything_in(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))


def interrupted_run(folder: Path, recipe: Recipe, step: int = 4) -> Path:
    with pytest.raises(Interrupted):
        train(recipe, folder / "run", on_event=stopping_at(step_is(step), KeyboardInterrupt()))
    return folder / "run"


def test_leftovers_and_a_torn_last_line_do_not_matter(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, whole = straight
    run = interrupted_run(tmp_path, recipe)
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / ".step-00000005.1a2b.tmp")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train(recipe, run, resume=True)
    assert_same_run(run, whole)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter/adapter_model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_torn_checkpoint_is_refused_by_name(
    tmp_path: Path, straight: tuple[Recipe, Path], name: str, damage: str
) -> None:
    recipe, whole = straight
    run = interrupted_run(tmp_path, recipe)
    newest = run / "checkpoints" / "step-00000004"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content if damage == "flip" else content[:-10])
    with pytest.raises(
        CheckpointError, match=r"step-00000004 is torn: .*Remove that directory to go on from step-"
    ) as caught:
        train(recipe, run, resume=True)
    assert Path(name).name in str(caught.value)
    if damage == "flip" and name == "optimizer.safetensors":
        shutil.rmtree(newest)
        train(recipe, run, resume=True)
        assert_same_run(run, whole)


def test_a_foreign_checkpoint_is_refused_with_what_differs(
    tmp_path: Path, straight: tuple[Recipe, Path], shared_model_dir: Path
) -> None:
    recipe, _ = straight
    run = interrupted_run(tmp_path, recipe)
    optim = recipe.optim.model_copy(update={"lr": 0.5})
    data = small_recipe(tmp_path / "other", shared_model_dir).data
    rows = (tmp_path / "other" / "train.jsonl").read_text().splitlines()
    (tmp_path / "other" / "train.jsonl").write_text("\n".join(rows[:-1]))
    with pytest.raises(CheckpointError) as caught:
        train(recipe.model_copy(update={"optim": optim, "data": data}), run, resume=True)
    told = str(caught.value)
    assert "step-00000004 belongs to another run" in told
    assert "recipe.optim.lr: 0.01 in that run, 0.5 now" in told
    assert "data.train: " in told
    assert "- base" not in told.split("\n", 1)[1].split("Resume with")[0]


def test_a_changed_base_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_model_dir(tmp_path))
    run = interrupted_run(tmp_path, recipe)
    tiny_model_dir(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match=r"belongs to another run; what differs:\n  - base: "):
        train(recipe, run, resume=True)


def test_metrics_that_lost_a_step_are_refused(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, _ = straight
    run = interrupted_run(tmp_path, recipe)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 2,' not in line))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl has 3 of the 4 steps|step 3 where 2 belongs"):
        train(recipe, run, resume=True)


def test_resume_without_a_checkpoint_begins_anew(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, whole = straight
    run = interrupted_run(tmp_path, recipe)
    shutil.rmtree(run / "checkpoints")
    seen: list[events.Event] = []
    train(recipe, run, resume=True, on_event=seen.append)
    assert any(isinstance(event, events.Note) and "has no checkpoint yet" in event.text for event in seen)
    assert_same_run(run, whole)


def test_another_environment_is_told(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, _ = straight
    run = interrupted_run(tmp_path, recipe)
    values = json.loads((run / "env.json").read_text())
    values["threads"] = 99
    (run / "env.json").write_text(json.dumps(values))
    seen: list[events.Event] = []
    train(recipe, run, resume=True, on_event=seen.append)
    assert any(isinstance(event, events.Note) and "threads was 99 and is" in event.text for event in seen)


def test_a_lost_environment_is_told(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, whole = straight
    run = interrupted_run(tmp_path, recipe)
    (run / "env.json").unlink()
    seen: list[events.Event] = []
    train(recipe, run, resume=True, on_event=seen.append)
    assert any(isinstance(event, events.Note) and "env.json is gone" in event.text for event in seen)
    assert_same_run(run, whole)


def test_a_damaged_best_checkpoint_never_becomes_the_adapter(
    tmp_path: Path, straight: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = straight
    # climbs from the third step on, so that the best step is not the last
    monkeypatch.setattr(steps, "factor", lambda config, step, total: 1.0 if step < 2 else -1.0)
    run = interrupted_run(tmp_path, recipe)
    weights = run / "checkpoints" / "step-00000002" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000002 is torn: adapter/adapter_model.safetensors does"):
        train(recipe, run, resume=True)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert train(recipe, run, resume=True).kept_step > 2


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\xff\xfe\x80", b'{"step": 5, "loss": \xc3'])
def test_bytes_that_a_power_cut_leaves_in_the_metrics_do_not_matter(
    tmp_path: Path, straight: tuple[Recipe, Path], tail: bytes
) -> None:
    recipe, whole = straight
    run = interrupted_run(tmp_path, recipe)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(tail)
    train(recipe, run, resume=True)
    assert_same_run(run, whole)


def test_the_probed_dtype_is_used_again(tmp_path: Path, straight: tuple[Recipe, Path]) -> None:
    recipe, _ = straight
    auto = recipe.model_copy(update={"base": recipe.base.model_copy(update={"dtype": "auto"})})
    run = interrupted_run(tmp_path, auto)
    values = json.loads((run / "env.json").read_text())
    values["dtype"] = other = {"bfloat16": "float32", "float32": "bfloat16"}[values["dtype"]]
    (run / "env.json").write_text(json.dumps(values))
    seen: list[events.Event] = []
    train(auto, run, resume=True, on_event=seen.append)
    assert next(event for event in seen if isinstance(event, events.Planned)).dtype == other
