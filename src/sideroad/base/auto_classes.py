"""transformers' automatic classes, by name."""

from __future__ import annotations

from typing import Any


def auto_class(name: str) -> Any:
    """Return one of transformers' automatic classes, such as `AutoModelForCausalLM`."""
    import transformers

    return getattr(transformers, name)
