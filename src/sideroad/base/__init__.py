"""Base models: where named ones come from, how any is loaded, and plain generation.

The names below are imported on first use, so that reading a recipe's schema costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sideroad.base.cache import cache_dir, cached, clear
    from sideroad.base.catalog import CATALOG, NamedModel
    from sideroad.base.config import BaseConfig
    from sideroad.base.generation import generate
    from sideroad.base.identity import BaseIdentity
    from sideroad.base.loading import Base, load_base, load_meta, load_tokenizer
    from sideroad.base.progress import Progress

_HOMES = {
    "BaseConfig": "config",
    "CATALOG": "catalog",
    "NamedModel": "catalog",
    "cache_dir": "cache",
    "cached": "cache",
    "clear": "cache",
    "Base": "loading",
    "load_base": "loading",
    "load_meta": "loading",
    "load_tokenizer": "loading",
    "BaseIdentity": "identity",
    "Progress": "progress",
    "generate": "generation",
}

__all__ = [
    "CATALOG",
    "Base",
    "BaseConfig",
    "BaseIdentity",
    "NamedModel",
    "Progress",
    "cache_dir",
    "cached",
    "clear",
    "generate",
    "load_base",
    "load_meta",
    "load_tokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
