"""PEFT's calls that are not here, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import nn

from sideroad.attaching import attached
from sideroad.errors import AdapterError, ConfigError

BASE_ROW = "__base__"
"""Name that stands for the base in `adapter_names`."""

CALLS: Mapping[str, str] = {
    "add_weighted_adapter": (
        "it comes with sideroad's composition of adapters. Several adapters act as their sum with set_adapter([\"a\", "
        "\"b\"]); set_scale(name, factor) weighs them"
    ),
    "hotswap_adapter": (
        "it comes with serving. load_adapter onto an existing name overwrites its tensors in place where they have the "
        "same shapes"
    ),
    "set_scale on a DoRA adapter": (
        "a factor of its scale would go into its norm too, so it would not weigh the change. "
        "model.base_model.handle.activate({name: factor}) weighs the whole change"
    ),
    "push_to_hub": "nothing here uploads. save_pretrained(directory), then upload it (hf upload NAME directory)",
}
"""Call → when it comes, and what to do until then."""


def refuse_reserved(name: str) -> None:
    """Raise AdapterError for an adapter's name that `adapter_names` takes for the base."""
    if name == BASE_ROW:
        raise AdapterError(f'an adapter cannot be named "{BASE_ROW}": in adapter_names that means the base.')


def refuse_wrapped(model: nn.Module) -> None:
    """Raise AdapterError if a model has adapters already: two wrappers would both see the adapters of both."""
    handle = attached(model) or next((found for one in model.modules() if (found := attached(one))), None)
    if isinstance(model.__dict__.get("peft_config"), dict) or handle is not None:
        shown = ", ".join(handle.names) if handle else "none left"
        raise AdapterError(
            f"this {type(model).__name__} has adapters already ({shown}); a second wrapper would share them. Use "
            "add_adapter or load_adapter of the PeftModel there is, or its unload() or merge_and_unload() first."
        )


def refuse(call: str) -> NoReturn:
    """Raise ConfigError for a call of PEFT's that is not supported."""
    raise ConfigError(f"{call} is not supported yet: {CALLS[call]}.")
