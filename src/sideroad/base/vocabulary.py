"""How many token rows a model's base had when it was published, from its configuration on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def published_rows(model: Any) -> int | None:
    """Return `vocab_size` of the configuration that a transformers model was loaded from; None where it is not known.

    Looks into the model's local directory or the hub's cache; the network is never asked.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    file = _config_file(str(name)) if name else None
    if file is None:
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = fields.get("text_config") if isinstance(fields, dict) else None
    parts = [part for part in (fields, text) if isinstance(part, dict)]
    return next((part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int), None)


def _config_file(name: str) -> Path | None:
    local = Path(name) / "config.json"
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not the name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None
