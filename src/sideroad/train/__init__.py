"""Training: recipes, the loop, checkpoints, evaluation and what a run leaves behind.

The names below are imported on first use, so that reading a recipe costs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sideroad.lazy import lazy

if TYPE_CHECKING:
    from sideroad.train.events import Event, Result
    from sideroad.train.interrupts import Interrupted
    from sideroad.train.recipe import Recipe, load_recipe
    from sideroad.train.run import train

_HOMES = {
    "Event": "sideroad.train.events",
    "Interrupted": "sideroad.train.interrupts",
    "Recipe": "sideroad.train.recipe",
    "Result": "sideroad.train.events",
    "load_recipe": "sideroad.train.recipe",
    "train": "sideroad.train.run",
}

__all__ = ["Event", "Interrupted", "Recipe", "Result", "load_recipe", "train"]

__getattr__ = lazy(__name__, _HOMES)
