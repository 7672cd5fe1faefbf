"""How values look on a terminal and in JSON: consoles, tables, and numbers with units."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160
_NAME_WIDTH = 32
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


class _Console(Console):
    """Leaves a broken pipe to `frame.Verb`, which has an exit code for it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(*, to_stderr: bool = False) -> Console:
    """A console that honours NO_COLOR and COLUMNS and does not squeeze tables when the output is piped."""
    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def piped_text() -> TextIO:
    """Stdin as UTF-8; a byte that is not becomes half a character, which prompts refuse by name."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def write_json(value: Any) -> None:
    """Write one JSON document to stdout; numbers that JSON does not have become null."""
    ascii_only = not sys.stdout.encoding.lower().startswith("utf")
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, left: int = 1, title: str = "") -> Table:
    """A table without a frame; the first `left` columns are words, the others numbers aligned right.

    On a narrow terminal the first column stays whole if it is short, so that names can be copied from it.
    """
    short = all(len(row[0]) <= _NAME_WIDTH for row in rows)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        whole = short and index == 0
        result.add_column(column, justify="left" if index < left else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return result


def side_by_side(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A ruled table of running text in columns of equal width, for comparing samples."""
    result = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, show_edge=False, expand=True)
    for column in columns:
        result.add_column(column, ratio=1, overflow="fold")
    for row in rows:
        result.add_row(*(Text(visible(cell)) for cell in row))
    return result


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters but tab and line end become their pictures."""
    return text.translate(_PICTURES)


def count(number: float) -> str:
    """A count in three digits or so: 950, 12.3 k, 4.88 M, 1.2 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            scaled = number / (size if letter != "k" else 1e3)
            return f"{scaled:.2f} {letter}" if scaled < 10 else f"{scaled:.1f} {letter}"
    return f"{number:,.0f}" if number == int(number) else f"{number:.1f}"


def size(count_of_bytes: float) -> str:
    """Bytes in decimal units: 812 B, 19.6 MB, 1.10 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count_of_bytes >= unit:
            scaled = count_of_bytes / unit
            return f"{scaled:.2f} {name}" if scaled < 10 else f"{scaled:.1f} {name}"
    return f"{count_of_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as 8 s, 4 min 05 s or 2 h 03 min; a question mark when not finite."""
    if not math.isfinite(seconds):
        return "?"
    if 0 < seconds < 1:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share(part: float, whole: float) -> str:
    """A share as a percentage with three significant digits; a dash when the whole is zero."""
    return f"{100 * part / whole:.3g} %" if whole else "–"
