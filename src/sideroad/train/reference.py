"""The table of every recipe key, from the schema itself: `python -m sideroad.train.reference > docs/recipe.md`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sideroad.config import Settings, settings_in
from sideroad.train.recipe import Recipe

INTRODUCTION = """\
# Recipe keys

Every key of a recipe, its default and what it does. The same names work on the command line: `--set optim.lr=1e-4`. An
unknown key is an error. Relative data paths start at the recipe file. This page is written from the schema.
"""


def recipe_reference() -> str:
    """Return `docs/recipe.md`: one table for each section of a recipe, in the order of the schema."""
    top = [(name, field) for name, field in Recipe.model_fields.items() if _is_plain(field)]
    parts = [INTRODUCTION, *_sections("", Recipe), "## At the top\n", _table("", top)]
    return "\n".join(parts)


def _sections(prefix: str, schema: type[Settings]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        members, path = _members(field), f"{prefix}{name}"
        for section in members:
            kind = section.model_fields["kind"].default if "kind" in section.model_fields else None
            yield f"## `{path}`{f' with `kind: {kind}`' if kind else ''}\n\n{_one_line(section.__doc__)}\n"
            plain = [(key, inner) for key, inner in section.model_fields.items() if _is_plain(inner)]
            yield _table(f"{path}.", plain)
            # what the members of a union share is told once
            if section is members[0]:
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


def _is_plain(field: FieldInfo) -> bool:
    """Whether a field has a line in its section's table: a value, or a word that may stand for settings."""
    return not _members(field) or isinstance(field.default, str)


def _members(field: FieldInfo) -> list[type[Settings]]:
    """The sections that a field may hold, the members of unions one by one."""
    return list(settings_in(field.annotation))


if __name__ == "__main__":
    sys.stdout.write(recipe_reference())
