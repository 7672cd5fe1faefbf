"""Mixed batches: which adapters act on which row, and how a layer's tensors are split by adapter and joined again."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sideroad.errors import AdapterError

Choice = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Segments:
    """Rows of one layer's input grouped by the adapters that act on them there.

    Args:
        weights: adapter key → weight, one mapping a segment; an empty one stands for rows that nothing acts on.
        sizes: rows of each segment.
        order: [rows], which row stands where once rows of one choice lie together; None where they do already.
        back: [rows], the inverse of `order`.
    """

    weights: tuple[Mapping[str, float], ...]
    sizes: tuple[int, ...]
    order: Tensor | None = None
    back: Tensor | None = None

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor a segment: views of `tensor` [rows, ...], or of one sorted copy where there is an order."""
        if len(self.sizes) == 1:
            return (tensor,)
        if self.order is not None:
            tensor = tensor.index_select(0, self.order)
        return torch.split(tensor, list(self.sizes))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parts, one a segment, as one tensor whose rows stand where `split` found them."""
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(tuple(parts))
        return joined if self.back is None else joined.index_select(0, self.back)


class Plan:
    """Which adapters act on which row of a batch, while a `rows` block is open.

    Args:
        rows: adapter key → weight for each row; an empty mapping stands for the base.
        copies: layers may also see each row this many times in succession.
    Raises:
        AdapterError: no rows, or `copies` below 1.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]], copies: int = 1) -> None:
        if not rows:
            raise AdapterError("rows() got an empty list; name adapters for every row of the batch, None for the base.")
        if copies < 1:
            raise AdapterError(f"rows() got copies={copies}; it must be at least 1.")
        self.rows = tuple(rows)
        self.copies = copies
        self.keys = tuple(dict.fromkeys(key for weights in rows for key in weights))
        """Keys of all adapters that act on some row."""
        self._made: dict[tuple[frozenset[str], int, torch.device], Segments] = {}

    def without(self, key: str) -> Plan:
        """Return the same plan where one adapter acts on no row."""
        kept = ({one: weight for one, weight in weights.items() if one != key} for weights in self.rows)
        return Plan(list(kept), self.copies)

    def segments(self, layer: nn.Module, x: Tensor, keys: Container[str]) -> Segments:
        """Return how this layer's rows fall into segments; made once for each set of keys, batch size and device.

        Args:
            layer: named in errors only.
            x: its input; dim 0 is the batch, of `len(rows)` or `len(rows) * copies` rows.
            keys: of the adapters that the layer has; where no row has any of them, dim 0 may be anything.
        Raises:
            AdapterError: dim 0 has another size.
        """
        size = x.shape[0] if x.ndim else 0
        mine = frozenset(key for key in self.keys if key in keys)
        if not mine:
            return Segments(({},), (size,))
        place = mine, size, x.device
        if place not in self._made:
            count = len(self.rows)
            if size not in (count, count * self.copies):
                self._refuse(layer, x)
            self._made[place] = self._make(mine, size // count, x.device)
        return self._made[place]

    def _make(self, mine: frozenset[str], each: int, device: torch.device) -> Segments:
        ranked = [key for key in self.keys if key in mine]
        choices: list[Choice] = [tuple((key, row[key]) for key in ranked if key in row) for row in self.rows]
        order: Sequence[int] = range(len(choices))
        acting = [choice for choice, _ in groupby(choices) if choice]
        together = len(acting) == len(set(acting))
        if not together:
            first = {choice: row for row, choice in reversed(list(enumerate(choices)))}
            order = sorted(order, key=lambda row: first[choices[row]])
        runs = [(choice, len(list(run))) for choice, run in groupby(choices[row] for row in order)]
        weights = tuple(dict(choice) for choice, _ in runs)
        sizes = tuple(length * each for _, length in runs)
        if together:
            return Segments(weights, sizes)
        # an index made under inference mode could not be saved for a backward later in the block
        with torch.inference_mode(False):
            index = torch.tensor([row * each + copy for row in order for copy in range(each)], device=device)
            return Segments(weights, sizes, index, index.argsort())

    def _refuse(self, layer: nn.Module, x: Tensor) -> None:
        count = len(self.rows)
        repeated = "" if self.copies == 1 else f", or {count * self.copies} with copies={self.copies}"
        raise AdapterError(
            f"rows() named {count} rows, but an input of {type(layer).__name__}({layer.extra_repr()}) is "
            f"{list(x.shape)}; its dim 0 must be the batch: {count}{repeated}. Name every row of the batch, and give "
            "copies=k where generate() repeats each row k times (num_beams, num_return_sequences). A layer that sees "
            "rows in another form (flattened tokens, a position table) cannot have an adapter in a mixed batch."
        )
