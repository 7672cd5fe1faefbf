"""The names of `sideroad.peft`: there, documented, light to import, and neither `peft` nor other rooms behind them."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import sideroad
from sideroad import peft as door

SOURCE = Path(sideroad.__file__).parent


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", door.__all__)
def test_each_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(door, name))


def test_all_but_two_kinds_of_names_are_pefts() -> None:
    elsewhere = {"TunerLayerStatus", "TunerModelStatus", "create_loraplus_optimizer", "create_lorafa_optimizer"}
    missing = {name for name in door.__all__ if not hasattr(peft, name)}
    assert missing <= elsewhere
    assert set(dir(door)) == set(door.__all__)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ImportError, match=r"IA3Config is not in sideroad.peft: other methods are not supported yet"):
        from sideroad.peft import IA3Config  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'LoraKonfig'"):
        from sideroad.peft import LoraKonfig  # noqa: F401


def test_the_door_leads_to_core_and_base_and_nothing_leads_to_the_door() -> None:
    rooms = ("cli", "train", "compose", "plan", "analyze", "data", "kernels")
    for file in SOURCE.rglob("*.py"):
        names = imported(file)
        if file.parent.name == "peft" and file.parent.parent == SOURCE:
            assert not [name for name in names if name.split(".")[0] in ("peft", "transformers")], file
            inside = tuple(f"sideroad.{room}." for room in rooms)
            assert not [name for name in names if f"{name}.".startswith(inside)], file
        else:
            assert not [name for name in names if name.startswith("sideroad.peft.")], file


def test_configurations_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from sideroad.peft import LoraConfig, TaskType; LoraConfig(r=4)\n"
        "print(*(name for name in ('torch', 'transformers', 'peft') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
