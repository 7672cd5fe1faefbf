"""A finished adapter in PEFT's words and as a value."""

from __future__ import annotations

from dataclasses import dataclass

from sideroad.adapter import Adapter
from sideroad.peft.config import LoraConfig


@dataclass(frozen=True, eq=False)
class Stored:
    """An adapter as read from a directory: the configuration PEFT would read there, and the value."""

    config: LoraConfig
    value: Adapter
