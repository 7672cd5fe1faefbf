"""The table of every recipe key, from the schema itself: `python -m sideroad.train.reference > docs/recipe.md`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sideroad.config import Settings
from sideroad.train.recipe import Recipe

INTRODUCTION = """\
# Recipe keys

Every key of a recipe, its default and what it does. The same names work on the command line: `--set optim.lr=1e-4`. An
unknown key is an error. Relative data paths start at the recipe file. This page is written from the schema.
"""


def recipe_reference() -> str:
    """Return `docs/recipe.md`: one table for each section of a recipe, in the order of the schema."""
    top = [(name, field) for name, field in Recipe.model_fields.items() if _settings_of(field) is None]
    parts = [INTRODUCTION, *_sections("", Recipe), "## At the top\n", _table("", top)]
    return "\n".join(parts)


def _sections(prefix: str, schema: type[Settings]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        section = _settings_of(field)
        if section is None:
            continue
        path = f"{prefix}{name}"
        yield f"## `{path}`\n\n{_one_line(section.__doc__)}\n"
        plain = [(key, inner) for key, inner in section.model_fields.items() if _settings_of(inner) is None]
        yield _table(f"{path}.", plain)
        yield from _sections(f"{path}.", section)


def _table(prefix: str, fields: list[tuple[str, FieldInfo]]) -> str:
    rows = [
        f"| `{prefix}{name}` | {_default(field)} | {_one_line(field.description).replace('|', chr(92) + '|')} |"
        for name, field in fields
    ]
    return "\n".join(["| key | default | what it does |", "|---|---|---|", *rows, ""])


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return str(value) if value != "" else '""'


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _settings_of(field: FieldInfo) -> type[Settings] | None:
    candidates = (field.annotation, *get_args(field.annotation))
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, Settings)), None)


if __name__ == "__main__":
    sys.stdout.write(recipe_reference())
