"""What a slow step of getting a base reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["waiting", "download", "convert", "load"]


@dataclass(frozen=True)
class Progress:
    """One report: the stage, and for a download how far it is.

    Attributes:
        stage: `waiting` (another process prepares the same model), `download`, `convert` or `load`.
        done: bytes so far; 0 where the stage is not counted in bytes.
        total: bytes in all, or None where unknown.
    """

    stage: Stage
    subject: str
    done: int = 0
    total: int | None = None


OnProgress = Callable[[Progress], None]
