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
        runs: lengths of the runs of rows that lie together, in the batch's order; they add up to its size.
        weights: adapter key → weight, one mapping a segment; an empty one stands for rows that nothing acts on.
        members: the runs of each segment.
    """

    runs: tuple[int, ...]
    weights: tuple[Mapping[str, float], ...]
    members: tuple[tuple[int, ...], ...]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return one tensor a segment: views of `tensor` [rows, ...], or of one sorted copy where runs lie apart."""
        if len(self.runs) == 1:
            # itself, not a view of it: what follows may change it in place, which autograd forbids on parts of a split
            return (tensor,)
        # cat and split, not an index: their backward is split and cat, and there is no index to keep on a device
        runs: Sequence[Tensor] = torch.split(tensor, list(self.runs))
        if len(self.runs) == len(self.members):
            return runs
        tensor = torch.cat([runs[run] for members in self.members for run in members])
        sizes = [sum(self.runs[run] for run in members) for members in self.members]
        return torch.split(tensor, sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parts, one a segment, as one tensor whose rows stand where `split` found them."""
        if len(parts) == 1:
            return parts[0]
        runs: dict[int, Tensor] = {}
        for part, members in zip(parts, self.members, strict=True):
            runs.update(zip(members, torch.split(part, [self.runs[run] for run in members]), strict=True))
        return torch.cat([runs[run] for run in range(len(runs))])


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
        self._made: dict[tuple[frozenset[str], int], Segments] = {}

    def without(self, key: str) -> Plan:
        """Return the same plan where one adapter acts on no row."""
        kept = ({one: weight for one, weight in weights.items() if one != key} for weights in self.rows)
        return Plan(list(kept), self.copies)

    def segments(self, layer: nn.Module, x: Tensor, keys: Container[str]) -> Segments:
        """Return how this layer's rows fall into segments; made once for each set of keys and batch size.

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
            return Segments((size,), ({},), ((0,),))
        place = mine, size
        if place not in self._made:
            count = len(self.rows)
            if size not in (count, count * self.copies):
                self._refuse(layer, x)
            self._made[place] = self._make(mine, size // count)
        return self._made[place]

    def _make(self, mine: frozenset[str], each: int) -> Segments:
        ranked = [key for key in self.keys if key in mine]
        choices: list[Choice] = [tuple((key, row[key]) for key in ranked if key in row) for row in self.rows]
        runs = [(choice, len(list(run)) * each) for choice, run in groupby(choices)]
        lengths = tuple(length for _, length in runs)
        members: dict[Choice, list[int]] = {}
        for index, (choice, _) in enumerate(runs):
            members.setdefault(choice, []).append(index)
        if all(len(found) == 1 for choice, found in members.items() if choice):
            # nothing acts on the runs that lie apart: they are segments of their own, and nothing is copied
            return Segments(
                lengths, tuple(dict(choice) for choice, _ in runs), tuple((run,) for run in range(len(runs)))
            )
        return Segments(lengths, tuple(map(dict, members)), tuple(map(tuple, members.values())))

    def _refuse(self, layer: nn.Module, x: Tensor) -> None:
        count = len(self.rows)
        repeated = "" if self.copies == 1 else f", or {count * self.copies} with copies={self.copies}"
        raise AdapterError(
            f"rows() named {count} rows, but an input of {type(layer).__name__}({layer.extra_repr()}) is "
            f"{list(x.shape)}; its dim 0 must be the batch: {count}{repeated}. Name every row of the batch, and give "
            "copies=k where generate() repeats each row k times (num_beams, num_return_sequences). A layer that sees "
            "rows in another form (flattened tokens, a position table) cannot have an adapter in a mixed batch."
        )


def refuse_sequence_first(modules: Mapping[str, nn.Module]) -> None:
    """Raise AdapterError for models in which dim 0 is the sequence: rows would be taken for places in it.

    Known by torch's own attention and recurrent layers, which say so (`batch_first=False`).

    Args:
        modules: of the model, by path.
    """
    kinds = (nn.MultiheadAttention, nn.RNNBase)
    found = [path for path, one in modules.items() if isinstance(one, kinds) and not one.batch_first]
    if found:
        raise AdapterError(
            f"rows() needs the batch in dim 0, but {found[0]} ({type(modules[found[0]]).__name__}) has the "
            "sequence there. Build the model with batch_first=True, or run one adapter at a time with using()."
        )
