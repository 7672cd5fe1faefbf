"""What enters the first adapted block, kept for each example: in memory, then in a file, each up to its limit."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sideroad.data.encode import Encoded

logger = logging.getLogger("sideroad.train.frozen_store")

CHUNK_TOKENS = 1024
"""Tokens whose hidden states are computed together."""


class FrozenStore:
    """Hidden states of examples, computed when first asked for.

    Examples are computed in fixed neighbourhoods, in their own order: what is kept for one depends on the data alone,
    not on which batches came before, so a resumed run computes the same bits again. Examples beyond both limits are
    computed alone each time.

    Args:
        examples: all that may be asked for; told apart as objects.
        compute: gives the hidden states [tokens, width] of each of some examples.
        width: of a hidden state.
        memory_bytes, disk_bytes: limits.
        file: where the part on disk lies; made when it is needed, and nobody else's.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        compute: Callable[[Sequence[Encoded]], list[Tensor]],
        *,
        width: int,
        dtype: torch.dtype,
        memory_bytes: int,
        disk_bytes: int,
        file: Path,
    ) -> None:
        self._compute = compute
        self._file = file
        self._chunks = _chunks(examples)
        self._chunk_of = {id(one): number for number, chunk in enumerate(self._chunks) for one in chunk}
        sizes = [sum(len(one) for one in chunk) for chunk in self._chunks]
        row_bytes = width * dtype.itemsize
        in_memory, memory_rows = _fitting(sizes, memory_bytes // row_bytes)
        on_disk, disk_rows = _fitting(sizes[in_memory:], disk_bytes // row_bytes)
        self.missing_bytes = sum(sizes) * row_bytes - (memory_rows + disk_rows) * row_bytes
        """What both limits lack to hold everything."""
        if disk_rows and not _reserved(file, disk_rows * row_bytes):
            on_disk = disk_rows = 0
        self._kept = in_memory + on_disk
        self._limit = in_memory
        self._starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        self._shape = memory_rows, disk_rows, width
        self._dtype = dtype
        self._memory: Tensor | None = None
        self._disk: Tensor | None = None
        self._done: set[int] = set()

    @property
    def kept_share(self) -> float:
        """Share of the tokens that both limits have room for."""
        return float(self._starts[self._kept] / max(1, self._starts[-1]))

    def holds(self, examples: Sequence[Encoded]) -> bool:
        """Whether these are among the examples of the store."""
        return all(id(example) in self._chunk_of for example in examples)

    def get(self, examples: Sequence[Encoded]) -> list[Tensor]:
        """Return the hidden states of examples, [tokens, width] each."""
        return [self._one(example) for example in examples]

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._memory = self._disk = None
        self._done.clear()
        self._file.unlink(missing_ok=True)

    def _one(self, example: Encoded) -> Tensor:
        number = self._chunk_of[id(example)]
        if number >= self._kept:
            return self._compute([example])[0]
        chunk = self._chunks[number]
        rows = self._rows(number)
        if number not in self._done:
            rows.copy_(torch.cat(self._compute(chunk)))
            self._done.add(number)
        start = 0
        for one in chunk:
            if one is example:
                return rows[start : start + len(one)]
            start += len(one)
        raise AssertionError("an example is in its chunk")

    def _rows(self, number: int) -> Tensor:
        start, stop = self._starts[number], self._starts[number + 1]
        memory_rows, disk_rows, width = self._shape
        if number < self._limit:
            if self._memory is None:
                self._memory = torch.empty(memory_rows, width, dtype=self._dtype)
            return self._memory[start:stop]
        if self._disk is None:
            size = disk_rows * width
            self._disk = torch.from_file(str(self._file), shared=True, size=size, dtype=self._dtype).view(-1, width)
            if os.name == "posix":
                self._file.unlink(missing_ok=True)  # the mapping lives on, and a killed process leaves nothing behind
        return self._disk[start - memory_rows : stop - memory_rows]


def _reserved(file: Path, size: int) -> bool:
    """Make a file with room for `size` bytes; False if that would take more than half of what the disk has free.

    A sparse file would end the process (SIGBUS) when the disk fills up later.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if size > shutil.disk_usage(file.parent).free // 2:
            raise OSError("it would take more than half of what the disk has free")
        with file.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        logger.warning("no room for %.0f MB in %s (%s): it is computed each time instead", size / 1e6, file, error)
        file.unlink(missing_ok=True)
        return False
    return True


def _chunks(examples: Sequence[Encoded]) -> list[list[Encoded]]:
    chunks: list[list[Encoded]] = []
    tokens = CHUNK_TOKENS
    for example in examples:
        if tokens + len(example) > CHUNK_TOKENS:
            chunks.append([])
            tokens = 0
        chunks[-1].append(example)
        tokens += len(example)
    return chunks


def _fitting(sizes: Sequence[int], rows: int) -> tuple[int, int]:
    """How many of the first chunks fit into so many rows, and the rows that they take."""
    taken = 0
    for number, size in enumerate(sizes):
        if taken + size > rows:
            return number, taken
        taken += size
    return len(sizes), taken
