"""From what a person names on the command line to an adapter, its directory and the base it was trained on."""

from __future__ import annotations

import os
from pathlib import Path

from sideroad.errors import AdapterError, did_you_mean

CONFIG_FILE = "adapter_config.json"


def adapter_dir(path: Path) -> Path:
    """The directory with the adapter's files: `path` itself, or `adapter/` in a run directory.

    Raises:
        AdapterError: nothing is there, or what is there is neither an adapter nor a finished run.
    """
    for candidate in (path, path / "adapter"):
        if os.path.isfile(candidate / CONFIG_FILE):
            return candidate
    if not os.path.exists(path):
        siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        raise AdapterError(f'no run or adapter at "{path}".{did_you_mean(path.name, siblings)}')
    if not path.is_dir():
        raise AdapterError(f'"{path}" is a file; give the directory that has {CONFIG_FILE}, or a run directory.')
    if (path / "recipe.yaml").is_file():
        raise AdapterError(
            f'the run "{path}" has no adapter yet. Finish it with: sideroad train {path / "recipe.yaml"} '
            f"--run {path} --resume"
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise AdapterError(
        f'"{path}" is neither an adapter (no {CONFIG_FILE}) nor a run (no adapter/ in it). Found there: {found}.'
    )


def adapter_name(path: Path) -> str:
    """A name for the adapter at `path`: its directory's, or its run's when the directory is called adapter."""
    place = path.resolve()
    return place.parent.name if place.name == "adapter" else place.name
