"""Trackers get every record of metrics.jsonl; stand-ins play their packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_runs import records, small_recipe

from sideroad.train.run import train

pytestmark = pytest.mark.usefixtures("quick_plots")


class Writer:
    """Plays torch's SummaryWriter."""

    made: list[Writer] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_both_trackers_get_what_metrics_get(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Writer.made.clear()
    logged: list[tuple[dict[str, Any], int]] = []
    started: dict[str, Any] = {}
    board = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(board, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    wandb = ModuleType("wandb")
    handle = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: (started.update(settings), handle)[1], raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    recipe = small_recipe(tmp_path, shared_model_dir, train={"trackers": ["tensorboard", "wandb"]})
    train(recipe, tmp_path / "run")
    expected = records(tmp_path / "run")
    writer = Writer.made[0]
    assert writer.closed
    assert writer.purge_step is None
    assert [(value, step) for name, value, step in writer.scalars if name == "loss"] == [
        (record["loss"], record["step"]) for record in expected if "loss" in record
    ]
    assert [step for _, step in logged] == [record["step"] for record in expected]
    assert started["config"]["optim"]["lr"] == 0.01
    assert started["id"] == (tmp_path / "run" / "wandb-id").read_text()
