"""What a run's result depends on, as plain values that can be compared key by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sideroad.train.recipe import Recipe

_IGNORED = ("base.model", "base.device", "data.train", "data.validation", "data.chat_template", "evaluate")
_IGNORED_IN_TRAIN = (
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.trackers",
    "train.frozen_memory_mb",
    "train.frozen_disk_mb",
)
ADDED = frozenset(
    ("recipe.train.fast", "recipe.train.compile", "recipe.train.cache_frozen", "recipe.data.share_prefixes")
)
"""Keys that runs of older versions lack; such a run goes on the way it began, whatever they say now (`setup`)."""
ADDED_AS: Mapping[str, Any] = {"recipe.adapter.method.trains": "both"}
"""Keys that runs of older versions lack → what those runs did; only a recipe that says so goes on."""


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that must be equal for a run to go on.

    Left out is what may change (checkpoints, trackers, scores, the device, which is compared as part of the
    environment) and what is compared by content instead of by name (the base's weights, the tokens).
    """
    values = recipe.model_dump(mode="json")
    for path in (*_IGNORED, *_IGNORED_IN_TRAIN):
        *parents, key = path.split(".")
        section = values
        for part in parents:
            section = section[part]
        del section[key]
    return values


def fingerprint(recipe: Recipe, *, base: str, train: str, validation: str | None) -> dict[str, Any]:
    """Recipe, base and data of a run.

    Args:
        base: sha256 of the base's weights; `train` and `validation` are those of the tokens and their marks.
    """
    return {"recipe": recipe_values(recipe), "base": base, "data": {"train": train, "validation": validation}}


def differing(stored: Any, current: Any, path: str = "") -> list[str]:
    """One line per value that differs between two fingerprints, by dotted path."""
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        keys = sorted(stored.keys() | current.keys())
        stored = {**{key: current[key] for key in keys if f"{path}.{key}" in ADDED and key in current}, **stored}
        stored = {**{key: ADDED_AS[f"{path}.{key}"] for key in keys if f"{path}.{key}" in ADDED_AS}, **stored}
        return [
            line for key in keys for line in differing(stored.get(key), current.get(key), f"{path}.{key}".strip("."))
        ]
    if stored == current:
        return []
    return [f"{path}: {json.dumps(stored)} in that run, {json.dumps(current)} now"]
