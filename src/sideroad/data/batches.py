"""From encoded examples to batches: an order that is a pure function, and two ways to lay sequences out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sideroad.data.encode import Encoded
from sideroad.errors import ConfigError, DataError
from sideroad.segments import Segments, apart

IGNORED = -100
"""Target of a position that the loss does not count."""

_BATCHES_PER_BUCKET = 32


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass.

    Attributes:
        input_ids: [rows, length] int64.
        position_ids: [rows, length] int64, from 0 in every sequence.
        attention_mask: [rows, length] int64, 1 for real tokens; None when packed (one row, isolated by position).
        targets: [rows, length] int64, already shifted: `targets[t]` is what to predict at t, -100 where nothing counts;
            never across the border of two sequences.
        lengths: tokens of each sequence, in order.
        trained_tokens: targets that count.
        real_tokens: tokens of the sequences: neither padding nor the saving of shared beginnings is counted.
        computed_tokens: all positions, padding included, shared beginnings once.
        segments: how the sequences of a packed row hang together; None for padded rows.
        extra: (places, targets), each [any] int64, beyond the first target of a place: where sequences part.
        origins: [length] int64, where beginnings are shared: for each place, the index of its token among the tokens
            of all examples, one after another as they were given.
        hidden: [rows, length, width], what enters the first adapted block, where that is known already.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    targets: Tensor
    lengths: tuple[int, ...]
    trained_tokens: int
    real_tokens: int
    computed_tokens: int
    segments: Segments | None = None
    extra: tuple[Tensor, Tensor] | None = None
    origins: Tensor | None = None
    hidden: Tensor | None = None


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    group_by_length: bool = False,
    padded: bool = False,
) -> list[tuple[int, ...]]:
    """Decide the batches of one epoch; a pure function, so that a resume needs only epoch and batch number.

    Order: sorted by `random.Random("sideroad epoch <seed> <epoch>").random()`, one draw per example, which Python
    promises to reproduce on every platform and version. Every example stands in exactly one batch.

    Args:
        lengths: tokens per example.
        batch_size: most examples per batch; the last batch may be smaller.
        max_tokens: most tokens per batch; an example longer than that stands alone. Both limits may be given.
        group_by_length: sort stretches of about 32 batches by length before cutting, then shuffle the batches, so that
            batch mates are of similar length.
        padded: tokens are counted as padding makes them, examples times the longest, instead of as a sum.
    Raises:
        ConfigError: neither limit is given, or one is below 1.
    """
    limits = [limit for limit in (batch_size, max_tokens) if limit is not None]
    if not limits or min(limits) < 1:
        raise ConfigError(f"batches need batch_size or max_tokens of at least 1; found {batch_size} and {max_tokens}")
    generator = random.Random(f"sideroad epoch {seed} {epoch}")
    order = _shuffled(range(len(lengths)), generator)
    if not group_by_length:
        return _cut(order, lengths, batch_size, max_tokens, padded)
    stretch = _BATCHES_PER_BUCKET * (batch_size or max(1, (max_tokens or 1) * len(lengths) // max(1, sum(lengths))))
    batches: list[tuple[int, ...]] = []
    for begin in range(0, len(order), stretch):
        bucket = sorted(order[begin : begin + stretch], key=lambda index: -lengths[index])
        batches += _cut(bucket, lengths, batch_size, max_tokens, padded)
    return [batches[index] for index in _shuffled(range(len(batches)), generator)]


def collate(examples: Sequence[Encoded], *, packed: bool, pad_id: int) -> Batch:
    """Lay examples out as one batch.

    Args:
        packed: one row [1, total] with restarting positions, no padding; else one row per example, padded on the right.
        pad_id: what padding is filled with; it never matters to the loss, even if it equals EOS.
    Raises:
        DataError: there is no example, or one is empty.
    """
    if not examples or not all(len(item) for item in examples):
        raise DataError("a batch needs at least one example, and none may be empty")
    targets = [_targets(item) for item in examples]
    lengths = tuple(len(item) for item in examples)
    mask = None
    if packed:
        ids = torch.tensor([[token for item in examples for token in item.ids]], dtype=torch.int64)
        wanted = torch.tensor([[target for row in targets for target in row]], dtype=torch.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        longest = max(lengths)
        ids = torch.tensor([item.ids + [pad_id] * (longest - len(item)) for item in examples], dtype=torch.int64)
        wanted = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in targets], dtype=torch.int64)
        mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).to(torch.int64)
        positions = torch.arange(longest)[None] * mask
    return Batch(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        targets=wanted,
        lengths=lengths,
        trained_tokens=int((wanted != IGNORED).sum()),
        real_tokens=sum(lengths),
        computed_tokens=ids.numel(),
        segments=apart(lengths) if packed else None,
    )


def _targets(item: Encoded) -> list[int]:
    following = zip(item.ids[1:], item.trained[1:], strict=True)
    return [token if trained else IGNORED for token, trained in following] + [IGNORED]


def _shuffled(indices: Iterable[int], generator: random.Random) -> list[int]:
    # random.shuffle may change between Python versions; the sequence of random() may not.
    return [index for _, index in sorted((generator.random(), index) for index in indices)]


def _cut(
    order: Sequence[int], lengths: Sequence[int], batch_size: int | None, max_tokens: int | None, padded: bool
) -> list[tuple[int, ...]]:
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    total = longest = 0
    for index in order:
        total, longest = total + lengths[index], max(longest, lengths[index])
        cost = longest * (len(current) + 1) if padded else total
        full = batch_size is not None and len(current) >= batch_size
        if current and (full or (max_tokens is not None and cost > max_tokens)):
            batches.append(tuple(current))
            current, total, longest = [], lengths[index], lengths[index]
        current.append(index)
    return [*batches, tuple(current)] if current else batches
