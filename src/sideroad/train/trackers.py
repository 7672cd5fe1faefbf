"""Metrics sent elsewhere as well: TensorBoard and Weights & Biases, both optional."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sideroad.errors import ConfigError, raise_findings
from sideroad.train.settings import Tracker

_PACKAGES: Mapping[Tracker, str] = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Receiver(Protocol):
    """Something that takes the records of metrics.jsonl as they come."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record; it has `step`."""

    def close(self) -> None:
        """Flush and let go; further records are lost."""


def check_installed(names: Iterable[Tracker]) -> None:
    """Make sure of the packages before any work is done.

    Raises:
        ConfigError: a tracker's package is not installed, with the command that installs it.
    """
    missing = [
        f'train.trackers: "{name}" needs the package {_PACKAGES[name]}, which is not installed. '
        f"Install it with: pip install 'sideroad[{name}]'"
        for name in names
        if importlib.util.find_spec(_PACKAGES[name]) is None
    ]
    raise_findings(ConfigError, "train.trackers", missing)


def open_trackers(names: Iterable[Tracker], run: Path, settings: Mapping[str, Any], start: int) -> list[Receiver]:
    """Start each tracker on a run.

    Args:
        run: run directory; its name is the run's name.
        settings: the resolved recipe, shown beside the metrics.
        start: steps already done; later records of a run cut short are purged where the tracker can.
    """
    makers: dict[Tracker, Callable[[], Receiver]] = {
        "tensorboard": lambda: TensorBoard(run, start),
        "wandb": lambda: WeightsAndBiases(run, settings),
    }
    return [makers[name]() for name in names]


class TensorBoard:
    """Writes event files to `tensorboard/` in the run directory."""

    def __init__(self, run: Path, start: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add each number as a scalar."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Sends records to the project `sideroad`; W&B's own settings (offline mode, key) come from its environment."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        module = importlib.import_module("wandb")
        marker = run / "wandb-id"
        if not marker.is_file():
            marker.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = module.init(
            project="sideroad",
            name=run.resolve().name,
            id=marker.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run),
            config=dict(settings),
        )

    def log(self, record: Mapping[str, Any]) -> None:
        """Send each number."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
