"""Ctrl-C held back for the moments in which a run's state changes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was stopped from the keyboard after a complete step; `checkpoint` is what --resume goes on from."""

    exit_code = 130

    def __init__(self, run: Path, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; {checkpoint} is complete. Go on by --resume with --run {run}")
        self.run = run
        self.step = step
        self.checkpoint = checkpoint


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Deliver SIGINT only once the block is through; outside the main thread signals never arrive anyway."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived:
        handler(*arrived[0])
