"""`sideroad train`: what it says before, during and after, what it leaves, and where it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Spoken, call, write_recipe

from sideroad.analyze.inspect import inspect_adapter
from sideroad.cli.train import run_directory


def test_a_run_is_announced_shown_and_reported(trained: tuple[Path, Spoken]) -> None:
    run, spoken = trained
    assert spoken.code == 0, spoken.err
    for words in (
        "lora, rank 4",
        "runs/task",
        "4,096 trainable parameters",
        "16 examples (4 for validation)",
        "3 steps on cpu in float32",
        "trained tok/s",
        "step 2  validation loss",
        "loading tiny-llama",
        "evaluating the adapted model  loss over 4 examples",
        "evaluating the adapted model  4/4 answers",
        "JSON parses",
        "exact match",
        "music in room 16",
        "sideroad chat runs/task",
        "sideroad merge runs/task/adapter --out runs/task/merged",
    ):
        assert words in spoken.out
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_files_named_at_the_end_exist(trained: tuple[Path, Spoken]) -> None:
    run, spoken = trained
    names = ("adapter", "samples.md", "loss.png", "metrics.jsonl", "checkpoints", "recipe.yaml", "env.json")
    assert all(f"runs/task/{name}" in spoken.out and (run / name).exists() for name in names)


@pytest.mark.parametrize(
    ("method", "header"),
    [
        (
            "{kind: adalora, rank: 4, target_rank: 2, every: 1, final: 0.4}",
            "adalora, rank 4 down to 2 on average, alpha 16, on all-linear\n",
        ),
        (
            "{rank: 4, scaling: alpha/sqrt(r), init: {kind: eva, batches: 2}}",
            "lora, rank 4, alpha 16, scaling alpha/sqrt(r), init eva (batches 2), on all-linear\n",
        ),
    ],
    ids=["adalora", "eva"],
)
def test_ranks_that_a_run_deals_are_told_at_its_end(place: Path, tmp_path: Path, method: str, header: str) -> None:
    setting = ("--set", f"adapter.method={method}", "--set", "evaluate.metrics=[]")
    spoken = call("train", place / "task.yaml", "--run", tmp_path / "run", *setting)
    assert spoken.code == 0, spoken.err
    assert f"method      {header}" in spoken.out
    shown = inspect_adapter(tmp_path / "run/adapter").ranks
    assert shown is not None
    assert shown.smallest < shown.largest
    told = f"ranks dealt to layers: {shown.smallest} to {shown.largest}, sum {shown.total} over {shown.layers} layers"
    assert told in spoken.out


def test_json_alone_on_stdout_and_progress_on_stderr(place: Path, tmp_path: Path) -> None:
    spoken = call("train", place / "task.yaml", "--run", tmp_path / "run", "--json", "--set", "train.max_steps=1")
    result = json.loads(spoken.out)
    assert (result["steps"], result["kept"]) == (1, "last")
    assert set(result["scores"]) == {"base", "adapted"}
    assert "trained tok/s" in spoken.err


def test_default_run_directory_is_the_next_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("a/task.yaml")
    assert run_directory(recipe, resume=False) == run_directory(recipe, resume=True) == Path("runs/task")
    (tmp_path / "runs/task").mkdir(parents=True)
    assert run_directory(recipe, resume=False) == Path("runs/task-2")
    assert run_directory(recipe, resume=True) == Path("runs/task")
    (tmp_path / "runs/task-2").mkdir()
    assert run_directory(recipe, resume=False) == Path("runs/task-3")
    assert run_directory(recipe, resume=True) == Path("runs/task-2")


def test_the_recipe_in_a_run_directory_resumes_that_run(run: Path) -> None:
    spoken = call("train", run / "recipe.yaml", "--resume")
    assert spoken.code == 0, spoken.err
    assert "this run is finished" in spoken.out


def test_a_taken_directory_is_refused(run: Path, place: Path) -> None:
    spoken = call("train", place / "task.yaml", "--run", run)
    assert spoken.code == 6
    assert "already holds a finished run" in spoken.err
    assert "--resume" in spoken.err


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optim.learning_rate=1", 'unknown key "optim.learning_rate"'),
        ("optim.lr=fast", "optim.lr: Input should be a valid number"),
        ("optim.lr", "is not key=value"),
        ("adapter.method.rank=0", "adapter.method.rank"),
        ("evaluate.metrics=[exct_match]", 'Did you mean "exact_match"?'),
    ],
)
def test_wrong_settings_exit_2(place: Path, tmp_path: Path, key: str, words: str) -> None:
    spoken = call("train", place / "task.yaml", "--run", tmp_path / "run", "--set", key)
    assert spoken.code == 2
    assert spoken.err.startswith("error: ")
    assert words in spoken.err
    assert "Traceback" not in spoken.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "code", "words"),
    [
        ("data.train=absent.jsonl", 3, "absent.jsonl"),
        ("base.model=smollm2-135m-instrukt", 4, 'Did you mean "smollm2-135m-instruct"?'),
        ("adapter.targets=q_projj", 5, 'Did you mean "q_proj"?'),
        ("adapter.method.rank=99", 5, "rank 99 is larger than"),
    ],
)
def test_errors_have_their_own_codes(place: Path, tmp_path: Path, key: str, code: int, words: str) -> None:
    spoken = call("train", place / "task.yaml", "--run", tmp_path / "run", "--offline", "--set", key)
    assert spoken.code == code, spoken.err
    assert words in spoken.err


def test_a_missing_recipe_names_those_that_are_there(place: Path) -> None:
    spoken = call("train", place / "tusk.yaml")
    assert spoken.code == 2
    assert 'Did you mean "task.yaml"?' in spoken.err


def test_ctrl_c_says_how_to_go_on_and_resume_goes_on(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tiny-llama", tmp_path / "tiny-llama")
    write_recipe(tmp_path, train={"max_steps": 100000, "epochs": 100000, "checkpoint_every": 1000})
    program = [sys.executable, "-m", "sideroad", "train", "task.yaml", "--run", "run"]
    process = subprocess.Popen(
        program, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < until:
        if metrics.exists() and metrics.read_text().count('"lr"') >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "interrupted after step" in err
    assert "sideroad train task.yaml --run run --resume" in err
    assert "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())
