"""The model card that stands beside an adapter: README.md with the fields that hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sideroad.adapter_files import CARD
from sideroad.errors import AdapterError
from sideroad.files import replace_file
from sideroad.peft.config import LoraConfig

FENCE = "---\n"


def write_card(config: LoraConfig | None, directory: Path) -> None:
    """Write the card of a model whose first adapter has this configuration; see `update_card`."""
    base = config.base_model_name_or_path if config else None
    tags = ["lora", "sideroad", *([f"base_model:adapter:{base}", "transformers"] if base else [])]
    task = "text-generation" if config and config.task_type == "CAUSAL_LM" else None
    update_card(directory, {"library_name": "peft", "base_model": base, "pipeline_tag": task}, tags)


def update_card(directory: Path, fields: Mapping[str, Any], tags: list[str]) -> None:
    """Write README.md, or bring the front matter of the one there is up to date; its text stays as it is.

    Args:
        fields: front matter; `library_name` and `base_model` are set, others only where they are missing.
        tags: to be added to those there are.
    Raises:
        AdapterError: the front matter there is cannot be read.
    """
    path = directory / CARD
    said, text = _split(path) if path.exists() else ({}, _text(fields))
    given = {name: value for name, value in fields.items() if value is not None}
    merged: dict[str, Any] = {**given, **said}
    merged.update((name, given[name]) for name in ("library_name", "base_model") if name in given)
    merged["tags"] = sorted({*(said.get("tags") or []), *tags})
    front = yaml.safe_dump(merged, sort_keys=True, allow_unicode=True)
    replace_file(path, f"{FENCE}{front}{FENCE}{text}".encode())


def _split(path: Path) -> tuple[dict[str, Any], str]:
    content = path.read_text(encoding="utf-8")
    if not content.startswith(FENCE):
        return {}, "\n" + content
    front, closed, text = content.removeprefix(FENCE).partition(f"\n{FENCE}")
    try:
        said = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        raise AdapterError(f"{path}: the front matter is not YAML: {error}. Mend it or remove the file.") from error
    if not closed or not isinstance(said, dict):
        raise AdapterError(f"{path}: the front matter does not end, or holds no fields. Mend it or remove the file.")
    return said, text


def _text(fields: Mapping[str, Any]) -> str:
    base = fields.get("base_model") or "a base model"
    return (
        f"\n# LoRA adapter for {base}\n\nMade with sideroad, in PEFT's format:\n\n```python\n"
        "from sideroad.peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, DIRECTORY)\n```\n"
    )
