"""The one pattern language for module paths (names, globs, `re:`), and the smaller one for blocks (`0-3,10-`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

from sideroad.errors import TargetError

V = TypeVar("V")

BLOCKS_ALLOWED = 100_000
"""Blocks that one range may mean."""


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern means a module path.

    Args:
        pattern: a name (whole dotted suffix), a glob over the whole path (it contains `*`, `?` or `[`), or `re:` and
            a regular expression for the whole path.
    Raises:
        TargetError: the regular expression is broken.
    """
    expression = _compiled(pattern)
    if expression is not None:
        return expression.fullmatch(path) is not None
    return path == pattern or path.endswith("." + pattern)


def is_name(pattern: str) -> bool:
    """Whether the pattern is a plain name, neither glob nor regular expression."""
    return _compiled(pattern) is None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise TargetError(f'pattern "{pattern[:200]}" is not a regular expression: {error}.') from error
    return re.compile(translate(pattern)) if any(sign in pattern for sign in "*?[") else None


def first_match(patterns: Mapping[str, V], path: str, default: V) -> V:
    """Return the value of the first pattern that means the path, else the default."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def shortest_names(paths: Iterable[str], all_paths: Iterable[str]) -> tuple[str, ...]:
    """Return the fewest, shortest names that match exactly `paths` among all of a model's module paths.

    A path that is itself the suffix of another one has no such name; it is given as `re:` and its escaped self.
    """
    wanted = list(dict.fromkeys(paths))
    refused = set(all_paths) - set(wanted)
    taken = {suffix for path in refused for suffix in _suffixes(path)}
    names = (next((name for name in _suffixes(path) if name not in taken), _exactly(path)) for path in wanted)
    return tuple(dict.fromkeys(names))


def _suffixes(path: str) -> list[str]:
    """All dotted suffixes of a path, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _exactly(path: str) -> str:
    return "re:" + re.escape(path)


def block_index(path: str, name: str | None) -> int | None:
    """Return the number of the block that a path is in.

    Args:
        name: of the block list, or None for the first number in the path.
    """
    parts = path.split(".")
    for before, part in pairwise(parts):
        if part.isascii() and part.isdecimal() and len(part) < 10 and (name is None or before == name):
            return int(part)
    return None


def parse_blocks(layers: str | Sequence[int], last: int, findings: list[str]) -> set[int]:
    """Read `0-3,7`, `10-` (up to `last`) or a list of numbers; what cannot be read is appended to `findings`."""
    if not isinstance(layers, str):
        negative = [index for index in layers if index < 0]
        if negative or not layers:
            findings.append(f"layers is {list(layers)}; blocks are counted from 0 and at least one is needed.")
        return {index for index in layers if index >= 0}
    wanted: set[int] = set()
    for piece in layers.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:(-)\s*([0-9]{1,9})?)?\s*", piece)
        start = int(found[1]) if found else 0
        end = start if found and not found[2] else int(found[3]) if found and found[3] else max(last, start)
        if not found or end < start:
            findings.append(f'layers "{layers}": "{piece.strip()}" is not a range; write 5, 0-3 or 10- (from 10 on).')
        elif end - start >= BLOCKS_ALLOWED:
            findings.append(f'layers "{layers}": "{piece.strip()}" means {end - start + 1} blocks; no model has that.')
        else:
            wanted |= set(range(start, end + 1))
    return wanted


def ranges(indices: Sequence[int]) -> str:
    """Write sorted numbers as `0-3, 7`."""
    pieces: list[list[int]] = []
    for index in indices:
        if pieces and index == pieces[-1][1] + 1:
            pieces[-1][1] = index
        else:
            pieces.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in pieces)
