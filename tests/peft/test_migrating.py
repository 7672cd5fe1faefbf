"""docs/migrating-from-peft.md: every row of its tables is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import migrating_config
import migrating_files
import migrating_model
import migrating_train
import migrating_wrap
import pytest

from sideroad.errors import ConfigError
from sideroad.peft import LoraConfig

GUIDE = (Path(__file__).parents[2] / "docs" / "migrating-from-peft.md").read_text(encoding="utf-8")
ROWS = {found[1]: found[2] for found in re.finditer(r"^\| (M\d+) \|(.*)$", GUIDE, re.MULTILINE)}
Check = Callable[[Path], None]


def checks(*modules: ModuleType) -> dict[str, Check]:
    """Id → the function whose name begins with it."""
    return {
        name.partition("_")[0].upper(): check
        for module in modules
        for name, check in vars(module).items()
        if re.match(r"m\d+_", name)
    }


CHECKS = checks(migrating_config, migrating_wrap, migrating_model, migrating_files, migrating_train)
REFUSED = [name for name in ROWS if 26 <= int(name[1:]) <= 40]


def test_every_row_has_a_check_and_every_check_a_row() -> None:
    assert len(ROWS) == len(re.findall(r"^\| M\d+ ", GUIDE, re.MULTILINE)), "an id stands twice"
    assert set(ROWS) == set(CHECKS) | set(REFUSED)
    assert not set(CHECKS) & set(REFUSED)


def test_every_id_that_the_text_mentions_is_a_row() -> None:
    assert set(re.findall(r"\bM\d+\b", GUIDE)) <= set(ROWS)


@pytest.mark.parametrize("row", [name for name in ROWS if name not in REFUSED])
def test_a_row_is_true(row: str, tmp_path: Path) -> None:
    CHECKS[row](tmp_path)


@pytest.mark.parametrize("row", REFUSED)
def test_a_field_of_a_row_raises_by_its_name(row: str) -> None:
    said = re.findall(r"`(?:(\w+)=)?([^`]+)`", ROWS[row].split("|")[0])
    field = ""
    for name, value in said:
        field = name or field
        with pytest.raises(ConfigError, match=f"{field} is "):
            LoraConfig(**{field: ast.literal_eval(value)})
    assert field
