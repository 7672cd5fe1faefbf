"""What a run raises when it is stopped from the keyboard."""

from __future__ import annotations

from pathlib import Path


class Interrupted(KeyboardInterrupt):
    """A run was stopped from the keyboard after a complete step; `checkpoint` is what --resume goes on from."""

    exit_code = 130

    def __init__(self, run: Path, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; {checkpoint} is complete. Go on by --resume with --run {run}")
        self.run = run
        self.step = step
        self.checkpoint = checkpoint
