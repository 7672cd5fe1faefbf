"""PEFT's calls that are not here, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from sideroad.errors import ConfigError

CALLS: Mapping[str, str] = {
    "add_weighted_adapter": (
        "it comes with sideroad's composition of adapters. Several adapters act as their sum with set_adapter([\"a\", "
        "\"b\"]); set_scale(name, factor) weighs them"
    ),
    "hotswap_adapter": (
        "it comes with serving. load_adapter onto an existing name overwrites its tensors in place where they have the "
        "same shapes"
    ),
    "push_to_hub": "nothing here uploads. save_pretrained(directory), then upload it (hf upload NAME directory)",
}
"""Call → when it comes, and what to do until then."""


def refuse(call: str) -> NoReturn:
    """Raise ConfigError for a call of PEFT's that is not supported."""
    raise ConfigError(f"{call} is not supported yet: {CALLS[call]}.")
