"""Base models: where named ones come from, how any is loaded, and plain generation.

The names below are imported on first use, so that reading a recipe's schema costs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sideroad.lazy import lazy

if TYPE_CHECKING:
    from sideroad.base.cache import cache_dir, cached, clear
    from sideroad.base.catalog import CATALOG, NamedModel
    from sideroad.base.config import BaseConfig
    from sideroad.base.generation import generate
    from sideroad.base.identity import BaseIdentity
    from sideroad.base.loading import Base, load_base, load_meta, load_tokenizer
    from sideroad.base.progress import Progress

_HOMES = {
    "BaseConfig": "sideroad.base.config",
    "CATALOG": "sideroad.base.catalog",
    "NamedModel": "sideroad.base.catalog",
    "cache_dir": "sideroad.base.cache",
    "cached": "sideroad.base.cache",
    "clear": "sideroad.base.cache",
    "Base": "sideroad.base.loading",
    "load_base": "sideroad.base.loading",
    "load_meta": "sideroad.base.loading",
    "load_tokenizer": "sideroad.base.loading",
    "BaseIdentity": "sideroad.base.identity",
    "Progress": "sideroad.base.progress",
    "generate": "sideroad.base.generation",
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


__getattr__ = lazy(__name__, _HOMES)
