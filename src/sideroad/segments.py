"""How the sequences of a packed row hang together: apart, or as a tree in which a common beginning stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a packed row that every sequence either has whole or not at all.

    A row lists the segments of a tree from the root down, children behind their parent, so that all that continues a
    segment lies right behind it. A token sees the segments above its own, and its own up to itself.

    Attributes:
        start, stop: its tokens in the row.
        end: of the last token that continues it; equal to `stop` where nothing does.
        offset: tokens of the sequence before it: the position of its first token.
    """

    start: int
    stop: int
    end: int
    offset: int = 0


Segments = tuple[Segment, ...]


def apart(lengths: Sequence[int]) -> Segments:
    """Return the segments of sequences that share nothing."""
    found, start = [], 0
    for length in lengths:
        found.append(Segment(start, start + length, start + length))
        start += length
    return tuple(found)


def longest(segments: Segments) -> int:
    """Return the tokens of the longest sequence."""
    return max((one.offset + one.stop - one.start for one in segments), default=0)


@lru_cache(maxsize=4)
def paths(segments: Segments) -> tuple[Tensor, Tensor]:
    """Return every sequence as the places of its tokens, and for every token a place where it stands in a sequence.

    Returns:
        [sequences, longest], each padded on the right with its first place; and [row], an index into the first result
        flattened, of the sequence in which the token comes first.
    """
    rows: list[list[int]] = []
    open_to: list[Segment] = []
    for one in segments:
        while open_to and open_to[-1].end <= one.start:
            open_to.pop()
        open_to.append(one)
        if one.end == one.stop:
            rows.append([place for part in open_to for place in range(part.start, part.stop)])
    width = max(len(row) for row in rows)
    owners: dict[int, int] = {}
    for index, row in enumerate(rows):
        for at, place in enumerate(row):
            owners.setdefault(place, index * width + at)
    padded = torch.tensor([row + row[:1] * (width - len(row)) for row in rows])
    return padded, torch.tensor([owners[place] for place in range(segments[-1].stop)])
