"""One run's place on disk: which file is where, who may write to it, and its metrics."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sideroad.errors import CheckpointError
from sideroad.files import cannot_write, read_json, replace_file

FROZEN_FILE = "frozen.cache"
"""Where a run keeps what enters its first adapted block while it goes on, if memory is too small for it."""

_LEFTOVER = re.compile(r"\.[a-z]+(\.[a-z]+)?\.[0-9a-f]{8}\.(tmp|old)")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, force it to disk and rename it into place."""
    replace_file(path, text.encode("utf-8"), CheckpointError)


def finite_or_null(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None, which is what strict JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON: non-finite numbers are null."""
    return json.dumps(finite_or_null(value), indent=indent, ensure_ascii=False, allow_nan=False)


class RunDirectory:
    """The directory of one run, held by at most one process at a time.

    It has recipe.yaml (resolved), env.json, metrics.jsonl, checkpoints/, adapter/ and, once finished, result.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.result = path / "result.json"
        self.samples = path / "samples.md"
        self.plot = path / "loss.png"

    @contextlib.contextmanager
    def held(self, *, resume: bool) -> Iterator[None]:
        """Keep every other process out while the context lasts; the hold ends with the process, however it ends.

        Raises:
            CheckpointError: another process has it, a run is already here and `resume` is off, or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"run directory {self.path} is a file; give another --run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(
                f"run directory {self.path} cannot be made: {error.strerror}; give another --run"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise CheckpointError(
                    f"run directory {self.path} is in use by process {holder}; wait for it, or give another --run"
                ) from error
            lock.truncate(0)
            with contextlib.suppress(OSError):  # a full disk is told of by the files that matter
                os.write(lock.fileno(), str(os.getpid()).encode())
            self._sweep()
            if not resume:
                self._refuse_existing()
            yield

    def _sweep(self) -> None:
        """Remove what a killed process left half written beside its place."""
        for path in self.path.iterdir():
            if _LEFTOVER.fullmatch(path.name) or path.name == FROZEN_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _refuse_existing(self) -> None:
        held = [item.name for item in (self.recipe, self.metrics, self.checkpoints, self.adapter) if item.exists()]
        others = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        if not others:
            return
        if not held:
            shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
            raise CheckpointError(
                f"run directory {self.path} holds other things ({shown}). Give a new or empty directory by --run."
            )
        state = "a finished run" if self.result.is_file() else "an unfinished run"
        raise CheckpointError(
            f"run directory {self.path} already holds {state} ({', '.join(held)}). "
            "Go on with it by --resume, or give another directory by --run."
        )

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """The object in one of this run's JSON files, or None when the file does not exist.

        Raises:
            CheckpointError: the file is not a JSON object.
        """
        return read_json(path, CheckpointError) if path.exists() else None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl in a single write, so a kill leaves at most its last line torn."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(to_json(record, indent=None) + "\n")
        except OSError as error:
            raise cannot_write(self.metrics, error, CheckpointError) from error

    def sync_metrics(self) -> None:
        """Force metrics.jsonl to disk; called before a checkpoint that counts on it."""
        try:
            if self.metrics.exists():
                with open(self.metrics, "a", encoding="utf-8") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.metrics, error, CheckpointError) from error

    def cut_metrics(self, step: int, *, validated: int | None) -> None:
        """Drop the records after `step`, a torn last line, and validations the checkpoint does not know of.

        Args:
            step: last step whose record stays; 0 keeps no step.
            validated: step of the last validation in the checkpoint, or None when it had seen none.
        Raises:
            CheckpointError: records of earlier steps are missing or unreadable.
        """
        kept, steps = [], 0
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.is_file() else ""
        for number, line in enumerate(text.splitlines(), start=1):
            record = _record(line)
            if record is None:
                break
            is_step = "loss" in record
            limit = step if is_step else _last_kept(record, validated)
            if record["step"] > limit:
                continue
            steps += is_step
            if is_step and record["step"] != steps:
                raise CheckpointError(f"{self.metrics} line {number}: step {record['step']} where {steps} belongs")
            kept.append(line + "\n")
        if steps != step:
            raise CheckpointError(
                f"{self.metrics} has {steps} of the {step} steps its checkpoint stands on; it was changed. "
                "Put the file back, or start anew in another --run."
            )
        write_atomically(self.metrics, "".join(kept))


def _last_kept(record: Mapping[str, Any], validated: int | None) -> int:
    """Last step up to which a record that is not a step's stays; the scores at the end are taken again."""
    return validated if validated is not None and set(record) == {"step", "validation_loss"} else -1


def _record(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None
