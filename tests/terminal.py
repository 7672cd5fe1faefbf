"""Calling the command line from a test, and a tiny task to call it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny import chat_rows, write_jsonl
from typer.testing import CliRunner

from sideroad.cli.main import app


@dataclass(frozen=True)
class Spoken:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path, stdin: str | bytes | None = None, columns: int | None = None) -> Spoken:
    """Run `sideroad ARGUMENTS` in this process, piped and so not squeezed, or as on a terminal of that many columns."""
    runner = CliRunner(env={"COLUMNS": None if columns is None else str(columns)})
    result = runner.invoke(app, [str(argument) for argument in arguments], input=stdin)
    return Spoken(result.exit_code, result.stdout, result.stderr)


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write data for a tiny task and `folder`/task.yaml; `changes` are keys such as `train={...}`, merged in."""
    write_jsonl(folder / "train.jsonl", chat_rows(16))
    write_jsonl(folder / "validation.jsonl", chat_rows(4, start=16))
    values: dict[str, Any] = {
        "base": {"model": "tiny-llama", "dtype": "float32", "device": "cpu"},
        "adapter": {"method": {"rank": 4}},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "optim": {"batch_size": 4},
        "train": {"max_steps": 3, "validate_every": 2, "checkpoint_every": 2},
        "evaluate": {"metrics": ["json_valid", "exact_match"], "max_new_tokens": 6, "samples": 2},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
