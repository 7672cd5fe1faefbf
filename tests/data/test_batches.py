from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sideroad.data.batches import collate, plan_epoch
from sideroad.data.encode import Encoded
from sideroad.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 60), max_size=200)
LIMIT = st.one_of(st.none(), st.integers(1, 150))


@settings(max_examples=150)
@given(
    LENGTHS,
    st.one_of(st.none(), st.integers(1, 12)),
    LIMIT,
    st.integers(0, 5),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_an_epoch_is_a_partition_within_the_limits(
    lengths: list[int], batch_size: int | None, max_tokens: int | None, seed: int, epoch: int, group: bool, padded: bool
) -> None:
    if batch_size is None and max_tokens is None:
        batch_size = 3
    plan = plan_epoch(
        lengths,
        batch_size=batch_size,
        max_tokens=max_tokens,
        seed=seed,
        epoch=epoch,
        group_by_length=group,
        padded=padded,
    )
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert batch
        assert batch_size is None or len(batch) <= batch_size
        sizes = [lengths[index] for index in batch]
        cost = max(sizes) * len(sizes) if padded else sum(sizes)
        assert max_tokens is None or cost <= max_tokens or len(batch) == 1


def test_the_order_is_written_in_stone() -> None:
    assert plan_epoch([1] * 8, batch_size=3, seed=0, epoch=0) == [(6, 3, 0), (4, 7, 2), (5, 1)]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plans = {
        (seed, epoch): tuple(plan_epoch([5] * 50, batch_size=4, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(plans.values())) == 9
    assert plans[1, 2] == tuple(plan_epoch([5] * 50, batch_size=4, seed=1, epoch=2))


def test_grouping_wastes_less_and_keeps_the_batch_size() -> None:
    lengths = [(index * 37) % 101 + 1 for index in range(400)]

    def padding(plan: list[tuple[int, ...]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in plan)

    plain = plan_epoch(lengths, batch_size=8)
    grouped = plan_epoch(lengths, batch_size=8, group_by_length=True)
    assert padding(grouped) < padding(plain) / 4
    assert sorted(map(len, grouped)) == sorted(map(len, plain))
    longest = [max(lengths[i] for i in batch) for batch in grouped]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("limits", [{}, {"batch_size": 0}, {"max_tokens": 0, "batch_size": 3}])
def test_limits_are_needed(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="batches need batch_size or max_tokens of at least 1"):
        plan_epoch([1, 2], **limits)


ROWS = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=150)
@given(ROWS, st.booleans())
def test_targets_are_the_next_trained_token_of_the_same_sequence(
    rows: list[list[tuple[int, bool]]], packed: bool
) -> None:
    examples = [Encoded([t for t, _ in row], [m for _, m in row], "x:1") for row in rows]
    batch = collate(examples, packed=packed, pad_id=0)
    lengths = [len(row) for row in rows]
    assert batch.lengths == tuple(lengths)
    assert batch.real_tokens == sum(lengths)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.position_ids.dtype == torch.int64
    if packed:
        assert batch.attention_mask is None
        assert batch.input_ids.shape == (1, sum(lengths))
        parts = [
            list(torch.split(tensor[0], lengths)) for tensor in (batch.input_ids, batch.targets, batch.position_ids)
        ]
    else:
        assert batch.attention_mask is not None
        assert batch.input_ids.shape == (len(rows), max(lengths))
        assert batch.attention_mask.sum(1).tolist() == lengths
        assert bool((batch.targets[batch.attention_mask == 0] == -100).all())
        parts = [
            [row[:n] for row, n in zip(tensor, lengths, strict=True)]
            for tensor in (batch.input_ids, batch.targets, batch.position_ids)
        ]
    trained = 0
    for row, ids, targets, positions in zip(rows, *parts, strict=True):
        assert ids.tolist() == [token for token, _ in row]
        assert positions.tolist() == list(range(len(row)))
        assert targets.tolist() == [token if mark else -100 for token, mark in row[1:]] + [-100]
        trained += sum(mark for _, mark in row[1:])
    assert batch.trained_tokens == trained
    assert batch.computed_tokens == batch.input_ids.numel()


def test_padding_equal_to_a_trained_token_is_no_target() -> None:
    batch = collate(
        [Encoded([1, 2], [False, True], "x:1"), Encoded([1, 3, 2, 2], [False, True, True, True], "x:2")],
        packed=False,
        pad_id=2,
    )
    assert batch.targets.tolist() == [[2, -100, -100, -100], [3, 2, 2, -100]]
    assert batch.trained_tokens == 4


def test_nothing_cannot_be_a_batch() -> None:
    with pytest.raises(DataError, match="at least one example"):
        collate([], packed=True, pad_id=0)
