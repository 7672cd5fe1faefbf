"""What a run says while it works: a live line on a terminal, plain lines at intervals everywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console

from sideroad.base.progress import OnProgress, Progress
from sideroad.cli import render

RECENT_STEPS = 30
PLAIN_SECONDS = 10.0


class Bar:
    """One line of progress on a terminal; elsewhere a plain line every few seconds and when the work is complete.

    The line is what is being done, a bar, and a text; all of it disappears from a terminal when the bar closes.
    """

    def __init__(
        self, console: Console, *, every_seconds: float = PLAIN_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        self.every_seconds = every_seconds
        self._clock = clock
        self._last_line = -float("inf")
        self._progress: rich_progress.Progress | None = None
        self._task: rich_progress.TaskID | None = None

    def show(self, what: str, done: float, total: float | None, text: str) -> None:
        """Move to `done` of `total` (None: unknown), with `text` after the bar."""
        if self.console.is_terminal:
            self._move(what, done, total, text)
        else:
            now = self._clock()
            if now - self._last_line >= self.every_seconds or (total is not None and done >= total):
                self._last_line = now
                self.say(f"{what}  {text}".rstrip())

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar where there is one."""
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away; the next `show` starts a new one."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._last_line = -float("inf")

    def _move(self, what: str, done: float, total: float | None, text: str) -> None:
        if self._progress is None or self._task is None:
            columns = (
                rich_progress.TextColumn("{task.description}", markup=False),
                rich_progress.BarColumn(bar_width=20),
                rich_progress.TextColumn("{task.fields[text]}", markup=False),
                rich_progress.TimeElapsedColumn(),
            )
            self._progress = rich_progress.Progress(
                *columns, console=self.console, transient=True, refresh_per_second=5
            )
            self._task = self._progress.add_task(what, total=total, text=text)
            self._progress.start()
        self._progress.update(self._task, description=what, completed=done, total=total, text=text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pace:
    """Trained tokens per second and seconds per step over the most recent steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)

    def add(self, seconds: float, trained_tokens: int) -> None:
        """Count one step."""
        self._steps.append((seconds, trained_tokens))

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second."""
        seconds = sum(step[0] for step in self._steps)
        return sum(step[1] for step in self._steps) / seconds if seconds > 0 else 0.0

    def remaining(self, steps: int) -> float:
        """Seconds that `steps` more steps take at this pace."""
        return sum(step[0] for step in self._steps) / len(self._steps) * steps if self._steps else float("inf")


def fetch_text(done_bytes: int, total_bytes: int | None) -> str:
    """How much of a download has arrived."""
    if not total_bytes:
        return render.size(done_bytes)
    return f"{render.size(done_bytes)} of {render.size(total_bytes)} ({render.share(done_bytes, total_bytes)})"


def evaluating(bar: Bar, who: str, examples: int, answered: int, asked: int) -> None:
    """Show on `bar` how far the scoring of a model is; `asked` is 0 while its loss is taken."""
    what = f"evaluating the {who} model"
    if asked:
        bar.show(what, answered, asked, f"{answered}/{asked} answers")
    else:
        bar.close()
        bar.show(what, 0, None, f"loss over {examples} examples")


def loading(bar: Bar) -> OnProgress:
    """Shows on `bar` how a base model is being fetched and loaded."""
    verbs = {"waiting": "waiting for another process to prepare", "convert": "converting", "load": "loading"}

    def report(progress: Progress) -> None:
        if progress.stage == "download":
            text = fetch_text(progress.done, progress.total)
            bar.show(f"downloading {progress.subject}", progress.done, progress.total, text)
        else:
            bar.close()
            bar.show(f"{verbs[progress.stage]} {progress.subject}", 0, None, "")

    return report
