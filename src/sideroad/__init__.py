"""sideroad: low-rank adaptation of language models, exact, visible, and fast on the machine you have.

The public names below load on first use, so that `import sideroad` (and with it the command line's help) stays instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sideroad.lazy import lazy

if TYPE_CHECKING:
    from sideroad.adapter import Adapter as Adapter
    from sideroad.attaching import attach as attach
    from sideroad.attaching import attached as attached
    from sideroad.base import load_base as load_base
    from sideroad.base.config import BaseConfig as BaseConfig
    from sideroad.config import AdapterConfig as AdapterConfig
    from sideroad.config import LoraMethod as LoraMethod
    from sideroad.errors import AdapterError as AdapterError
    from sideroad.errors import BaseModelError as BaseModelError
    from sideroad.errors import CheckpointError as CheckpointError
    from sideroad.errors import ConfigError as ConfigError
    from sideroad.errors import DataError as DataError
    from sideroad.errors import MergeError as MergeError
    from sideroad.errors import SideroadError as SideroadError
    from sideroad.errors import TargetError as TargetError
    from sideroad.errors import TrainingError as TrainingError
    from sideroad.handle import Attached as Attached
    from sideroad.lowrank import LowRank as LowRank
    from sideroad.targets import resolve as resolve
    from sideroad.train.recipe import Recipe as Recipe
    from sideroad.train.recipe import load_recipe as load_recipe

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "sideroad.adapter",
    "AdapterConfig": "sideroad.config",
    "AdapterError": "sideroad.errors",
    "Attached": "sideroad.handle",
    "BaseConfig": "sideroad.base.config",
    "BaseModelError": "sideroad.errors",
    "CheckpointError": "sideroad.errors",
    "ConfigError": "sideroad.errors",
    "DataError": "sideroad.errors",
    "LoraMethod": "sideroad.config",
    "LowRank": "sideroad.lowrank",
    "MergeError": "sideroad.errors",
    "Recipe": "sideroad.train.recipe",
    "SideroadError": "sideroad.errors",
    "TargetError": "sideroad.errors",
    "TrainingError": "sideroad.errors",
    "attach": "sideroad.attaching",
    "attached": "sideroad.attaching",
    "load_base": "sideroad.base",
    "load_recipe": "sideroad.train.recipe",
    "resolve": "sideroad.targets",
}

__all__ = sorted(_HOMES)

__getattr__ = lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
