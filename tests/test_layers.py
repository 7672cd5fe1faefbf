"""Imports point down only, and help needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sideroad"
LEVEL = {
    "door": 4, "cli": 3, "peft": 3, "train": 2, "compose": 2, "plan": 2, "analyze": 2, "data": 2,
    "base": 1, "kernels": 1,
}  # fmt: skip
SIDEWAYS = {("train", "data"), ("compose", "data"), ("compose", "train")}
CORE = 0
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pyarrow", "numpy", "pydantic")
LIGHT = {
    "import sideroad": (),
    "import sideroad.data.config": ("pydantic",),
    "import sideroad.train.recipe": ("pydantic",),
    "import sideroad.base.locate": ("pydantic",),
    "from sideroad.base import BaseConfig, CATALOG, cache_dir, cached\n"
    "cached('smollm2-135m-instruct'), CATALOG['smollm2-135m-instruct'].config()": ("pydantic",),
}
"""Code and which of `HEAVY` it may load."""
HELP = ([], ["--help"], ["train", "--help"], ["chat", "--help"], ["--version"])


def room(module: str) -> str:
    """First package below sideroad (`train` of sideroad.train.loop), `core` for single files, `door` for the way in."""
    parts = module.split(".")
    if parts[1:] in ([], ["__init__"], ["__main__"]):
        return "door"
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "core"


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(here: str, there: str) -> bool:
    return here == there or (here, there) in SIDEWAYS or LEVEL.get(there, CORE) < LEVEL.get(here, CORE)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    here = room(".".join(["sideroad", *file.relative_to(SOURCE).with_suffix("").parts]))
    for name in imports(file):
        if name.startswith("sideroad."):
            assert allowed(here, room(name)), f"{file.relative_to(SOURCE)} ({here}) imports {name}"
        if name.split(".")[0] == "transformers":
            assert here in ("base", "kernels", "data"), f"{file.relative_to(SOURCE)} imports {name}"


def test_a_layer_that_points_up_is_seen() -> None:
    assert not allowed("core", "base")
    assert not allowed("base", "train")
    assert not allowed("data", "train")
    assert not allowed("analyze", "compose")
    assert allowed("train", "data")
    assert allowed("cli", "core")


def loaded_by(code: str) -> set[str]:
    """Which of `HEAVY` a new interpreter has loaded after that code."""
    code = f"import sys\n{code}\nprint('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(shown.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"from sideroad.cli.main import app\ntry: app({arguments!r})\nexcept SystemExit: pass"
    assert loaded_by(code) == set()


@pytest.mark.parametrize("code", LIGHT)
def test_the_light_modules_import_nothing_heavy(code: str) -> None:
    assert loaded_by(code) <= set(LIGHT[code])


def test_what_is_loaded_is_seen() -> None:
    assert "numpy" in loaded_by("import numpy")
