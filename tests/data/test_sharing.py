"""Rows that hold common beginnings once: every sequence keeps its path, its targets and its count."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sideroad.data.batches import IGNORED
from sideroad.data.encode import Encoded
from sideroad.data.sharing import group, saved_tokens, share
from sideroad.segments import paths

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=7)


def encoded(rows: Sequence[Sequence[int]]) -> list[Encoded]:
    return [Encoded(list(row), [False] + [at % 3 > 0 for at in range(1, len(row))], "") for row in rows]


def predicted(example: Encoded) -> list[tuple[tuple[int, ...], int]]:
    """What an example predicts, each with all that stands before it."""
    return [(tuple(example.ids[:at]), example.ids[at]) for at in range(1, len(example)) if example.trained[at]]


@given(ROWS, st.integers(1, 4))
def test_every_sequence_is_there_with_what_it_predicts(rows: list[list[int]], shortest: int) -> None:
    examples = encoded(rows)
    batch = share(examples, shortest)
    saved = saved_tokens(rows, shortest)
    if batch is None:
        assert saved == 0
        return
    ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    assert (batch.real_tokens - batch.computed_tokens, batch.computed_tokens) == (saved, len(ids))
    assert batch.segments is not None
    padded, _ = paths(batch.segments)
    found = []
    for row in padded.tolist():
        length = max(at + 1 for at, place in enumerate(row) if at == 0 or place != row[0])
        found.append(row[:length])
        assert [positions[place] for place in found[-1]] == list(range(length))
    texts = {tuple(ids[place] for place in path) for path in found}
    leaves = {tuple(row) for row in rows}
    assert texts <= leaves
    assert all(any(text[: len(row)] == row for text in texts) for row in leaves)
    # what each place has before it, from any path through it
    before = {path[at]: tuple(ids[place] for place in path[: at + 1]) for path in found for at in range(len(path))}
    assert batch.extra is not None
    told = [(place, target) for place, target in enumerate(batch.targets[0].tolist()) if target != IGNORED]
    told += list(zip(*(one.tolist() for one in batch.extra), strict=True))
    expected = [pair for example in examples for pair in predicted(example)]
    assert sorted((before[place], target) for place, target in told) == sorted(expected)
    assert batch.trained_tokens == len(expected)
    together = [token for example in examples for token in example.ids]
    assert batch.origins is not None
    assert [together[at] for at in batch.origins.tolist()] == ids


def test_short_beginnings_are_not_worth_it() -> None:
    rows = [[1] * 7 + [number] * 5 for number in (2, 3, 4)]
    assert share(encoded(rows)) is None
    assert share(encoded(rows), shortest=7) is not None
    assert saved_tokens(rows) == 0
    assert saved_tokens(rows, shortest=7) == 14


def test_a_step_is_regrouped_and_stays_the_same_step() -> None:
    ids = [[1, 1, number] if number % 2 else [2, 2, number] for number in range(8)]
    found = group([(0, 1, 2), (3, 4), (5, 6, 7)], ids)
    assert found == [(1, 3, 5), (7, 0), (2, 4, 6)]
