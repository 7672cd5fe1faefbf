"""Checkpoints: everything a run needs to go on, complete on disk or not there at all.

checkpoints/step-00000050/adapter/                PEFT files, usable as an adapter
                          optimizer.safetensors   AdamW's moments, "<parameter>/<name>"
                          state.json              progress, fingerprint, sha256 of every file and of itself
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sideroad.adapter import Adapter
from sideroad.errors import AdapterError, CheckpointError
from sideroad.files import replace_directory
from sideroad.tensor_files import read_tensors
from sideroad.train.fingerprint import differing
from sideroad.train.progress import Progress
from sideroad.train.run_directory import to_json

FORMAT = 1
STATE, OPTIMIZER, ADAPTER = "state.json", "optimizer.safetensors", "adapter"

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A run's state read back from `path`; `optimizer` maps "<parameter>/<name>" to tensors."""

    path: Path
    progress: Progress
    adapter: Adapter
    optimizer: Mapping[str, Tensor]


def name_of(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Steps that had been taken when a checkpoint was written, by its name."""
    return int(path.name.removeprefix("step-"))


def write(
    folder: Path,
    progress: Progress,
    adapter: Adapter,
    optimizer: Mapping[str, Tensor],
    fingerprint: Mapping[str, Any],
) -> Path:
    """Write one checkpoint under `folder`: beside its place, to disk, then renamed there in one move.

    Args:
        fingerprint: what the run depends on (recipe, data, base); a resume with another one is refused.
    Returns:
        The checkpoint's directory.
    """
    final = folder / name_of(progress.step)

    def build(draft: Path) -> None:
        adapter.save(draft / ADAPTER)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.items()}, draft / OPTIMIZER)
        files = {path.relative_to(draft).as_posix(): _sha256(path) for path in _files(draft)}
        state = {"format": FORMAT, "progress": progress.to_json(), "fingerprint": fingerprint, "files": files}
        (draft / STATE).write_text(to_json({**state, "sha256": _seal(state)}) + "\n", encoding="utf-8")

    replace_directory(final, build, error=CheckpointError)
    return final


def clean(folder: Path) -> None:
    """Remove what a killed process left half written, and put back a checkpoint it was replacing."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob(".step-*")):
        final = folder / path.name[1:].partition(".")[0]
        if path.suffix == ".old" and not final.exists():
            os.replace(path, final)
        else:
            shutil.rmtree(path)


def listed(folder: Path) -> list[Path]:
    """Checkpoints under `folder` by step, the newest last; whether they are whole is for `read` to say."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for path in listed(folder)[:-keep]:
        if best_step is None or path.name != name_of(best_step):
            shutil.rmtree(path)


def read(path: Path, fingerprint: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Args:
        fingerprint: of the run that wants to go on.
    Raises:
        CheckpointError: it is torn (names the file), of another format, or of another recipe, data or base (names
            what differs).
    """
    state = _read_whole(path)
    foreign = differing(state["fingerprint"], json.loads(to_json(fingerprint)))
    if foreign:
        listing = "".join(f"\n  - {item}" for item in foreign)
        raise CheckpointError(
            f"checkpoint {path} belongs to another run; what differs:{listing}\n"
            "Resume with the recipe, data and base it was made with, or start anew in another --run."
        )
    try:
        return Checkpoint(
            path, Progress.from_json(state["progress"]), Adapter.load(path / ADAPTER), read_tensors(path / OPTIMIZER)
        )
    except AdapterError as error:
        raise CheckpointError(_torn(path, str(error))) from error


def load_adapter(folder: Path, step: int) -> Adapter | None:
    """The adapter in the checkpoint after `step` steps, or None when there is no such checkpoint.

    Raises:
        CheckpointError: the checkpoint is torn.
    """
    path = folder / name_of(step)
    if not path.is_dir():
        return None
    _read_whole(path)
    return Adapter.load(path / ADAPTER)


def load_tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """The tensors beside the adapter in the checkpoint after `step` steps, which `load_adapter` has checked."""
    return read_tensors(folder / name_of(step) / OPTIMIZER)


def _read_whole(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every file has the recorded bytes."""
    state = _read_state(path)
    damaged = [
        f"{name} {'is missing' if not (path / name).is_file() else 'does not have the recorded sha256'}"
        for name, digest in state["files"].items()
        if not (path / name).is_file() or _sha256(path / name) != digest
    ]
    if damaged:
        raise CheckpointError(_torn(path, "; ".join(damaged)))
    return state


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        seal = state.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(_torn(path, f"{STATE} cannot be read ({error})")) from error
    if seal != _seal(state):
        raise CheckpointError(_torn(path, f"{STATE} does not have the recorded sha256"))
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state.get('format')}; this sideroad reads {FORMAT}. "
            "Resume with the sideroad that wrote it, or start anew in another --run."
        )
    return dict(state)


def _torn(path: Path, what: str) -> str:
    older = [item.name for item in listed(path.parent) if item.name < path.name]
    way = f"to go on from {older[-1]}" if older else "to start this run from the beginning"
    return f"checkpoint {path} is torn: {what}. Remove that directory {way}, then resume again."


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(to_json(state)), sort_keys=True).encode()).hexdigest()
