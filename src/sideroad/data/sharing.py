"""Packed rows in which a beginning that several sequences share stands once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from sideroad.data.batches import IGNORED, Batch
from sideroad.data.encode import Encoded
from sideroad.segments import Segment

SHORTEST = 8
"""Fewest tokens worth sharing: attending to a beginning of its own costs about as much as they do (measured)."""


@dataclass
class _Tree:
    """Segments as they are laid down, for each place a sequence that it is of, and for each sequence its places."""

    ids: list[int]
    positions: list[int]
    owners: list[int]
    segments: list[Segment]
    places: list[list[int]]


def share(examples: Sequence[Encoded], shortest: int = SHORTEST) -> Batch | None:
    """Lay examples out as one packed row that holds common beginnings once; None if they share too little.

    Every sequence keeps its own path through the row: its loss and gradients are those that it has alone. A place
    behind which sequences part predicts several tokens: the further ones are in the batch's `extra`.

    Args:
        examples: none empty.
        shortest: fewest tokens of a shared beginning.
    """
    ordered = sorted(range(len(examples)), key=lambda index: examples[index].ids)
    rows = [examples[index].ids for index in ordered]
    common = _common(rows)
    if max(common, default=0) < shortest:
        return None
    tree = _Tree([], [], [], [], [[] for _ in rows])
    _lay(tree, rows, common, range(len(rows)), 0, shortest)
    first: dict[int, int] = {}
    places, targets = [], []
    for path, index in zip(tree.places, ordered, strict=True):
        for place, target in _targets(examples[index], path):
            if place in first:
                places.append(place)
                targets.append(target)
            else:
                first[place] = target
    starts = [0, *accumulate(len(example) for example in examples)]
    origins = [starts[ordered[owner]] + at for owner, at in zip(tree.owners, tree.positions, strict=True)]
    wanted = [first.get(place, IGNORED) for place in range(len(tree.ids))]
    return Batch(
        input_ids=torch.tensor([tree.ids]),
        position_ids=torch.tensor([tree.positions]),
        attention_mask=None,
        targets=torch.tensor([wanted]),
        lengths=tuple(len(row) for row in rows),
        trained_tokens=len(first) + len(targets),
        real_tokens=sum(len(row) for row in rows),
        computed_tokens=len(tree.ids),
        segments=tuple(tree.segments),
        extra=(torch.tensor(places, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)),
        origins=torch.tensor(origins),
    )


def saved_tokens(rows: Sequence[Sequence[int]], shortest: int = SHORTEST) -> int:
    """Return how many tokens `share` would save on a batch of these ids, without laying it out."""
    ordered = sorted(rows, key=list)
    return _saved(_common(ordered), range(len(ordered)), 0, shortest)


def group(batches: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Regroup the examples of one optimizer step so that those with a common beginning meet in a micro-batch.

    The step's examples, and so its gradient, stay the same; each micro-batch keeps its number of examples.

    Args:
        batches: micro-batches of indices into `ids`.
    """
    members = sorted((index for batch in batches for index in batch), key=lambda index: (ids[index], index))
    supply = iter(members)
    return [tuple(next(supply) for _ in batch) for batch in batches]


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each row shares with the next one."""
    return [_shared(one, other) for one, other in pairwise(rows)]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(index for index in range(shorter) if one[index] != other[index])


def _families(common: Sequence[int], members: range, depth: int, shortest: int) -> Iterator[tuple[range, int]]:
    """Split neighbours into runs that share enough beyond `depth`, each with the depth down to which all of it does."""
    start = members.start
    for index in members:
        last = index + 1 == members.stop
        if last or common[index] < depth + shortest:
            family = range(start, index + 1)
            yield family, min((common[at] for at in family[:-1]), default=depth)
            start = index + 1


def _lay(
    tree: _Tree, rows: Sequence[Sequence[int]], common: Sequence[int], members: range, depth: int, shortest: int
) -> None:
    """Lay down what comes after the first `depth` tokens of neighbouring rows, which share those."""
    for family, shared in _families(common, members, depth, shortest):
        until = shared if len(family) > 1 else len(rows[family.start])
        number, start = len(tree.segments), len(tree.ids)
        tree.ids += rows[family.start][depth:until]
        tree.positions += range(depth, until)
        tree.owners += [family.start] * (until - depth)
        stop = len(tree.ids)
        for member in family:
            tree.places[member] += range(start, stop)
        if stop > start:
            tree.segments.append(Segment(start, stop, stop, depth))
        if len(family) > 1:
            _lay(tree, rows, common, family, until, shortest)
            tree.segments[number] = Segment(start, stop, len(tree.ids), depth)


def _saved(common: Sequence[int], members: range, depth: int, shortest: int) -> int:
    total = 0
    for family, shared in _families(common, members, depth, shortest):
        if len(family) > 1:
            total += (len(family) - 1) * (shared - depth) + _saved(common, family, shared, shortest)
    return total


def _targets(example: Encoded, path: Sequence[int]) -> Iterator[tuple[int, int]]:
    for at, (token, trained) in enumerate(zip(example.ids[1:], example.trained[1:], strict=True)):
        if trained:
            yield path[at], token
