"""One short run on a tiny model, made once through the command line, for the verbs that need a result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from terminal import Spoken, call, write_recipe
from tiny import tiny_model_dir


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny-llama/, data and task.yaml; read only."""
    folder = tmp_path_factory.mktemp("task")
    tiny_model_dir(folder)
    write_recipe(folder)
    return folder


@pytest.fixture(scope="session")
def trained(place: Path) -> tuple[Path, Spoken]:
    """A finished run of task.yaml and what `sideroad train` said; read only."""
    run = place / "runs" / "task"
    before = Path.cwd()
    os.chdir(place)
    try:
        return run, call("train", "task.yaml", "--offline")
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def run(trained: tuple[Path, Spoken]) -> Path:
    """The run directory of `trained`."""
    return trained[0]
