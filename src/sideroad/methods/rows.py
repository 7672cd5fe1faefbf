"""Trained rows of an embedding or output head: some tokens' vectors, and nothing else of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sideroad.kinds.embedding import embed_scale


class RowsDelta(nn.Module):
    """Trained rows of a weight [tokens, dim]: `W'[ids] = rows`, the rest as it was.

    On an embedding the looked-up rows change; on a linear head the logits of those tokens. What is added is the
    difference to the base's rows, taken in the wider dtype: exactly nothing at the start, and several adapters add up.

    Args:
        rows: [ids, dim], in the order of `ids`.
        ids: token ids, each once.
    """

    ids: Tensor
    order: Tensor
    shared = True
    """The change is that of everything that holds the weight: a merge writes it once and keeps the tie."""

    def __init__(self, rows: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.name(ids)

    def name(self, ids: Sequence[int]) -> None:
        """Let the rows stand for these token ids."""
        device = "cpu" if self.rows.is_meta else self.rows.device
        named = torch.tensor(list(ids), dtype=torch.long, device=device)
        self.register_buffer("ids", named, persistent=False)
        self.register_buffer("order", torch.argsort(named), persistent=False)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the change.

        Args:
            x: token ids [...] of an embedding, or a head's input [..., dim].
            y: the layer's own output, [..., dim] or [..., tokens].
            layer: the embedding or head; its weight is read, it is not called.
        """
        change = (weight * self.change(layer)).to(y.dtype)
        if not isinstance(layer, nn.Embedding):
            return y.index_add(-1, self.ids, functional.linear(x, change.to(x.dtype)).to(y.dtype))
        ordered = self.ids[self.order]
        place = torch.searchsorted(ordered, x.long()).clamp(max=len(ordered) - 1)
        hit = (ordered[place] == x).unsqueeze(-1).to(y.dtype)
        return y + functional.embedding(self.order[place], change) * hit * embed_scale(layer, y)

    def change(self, layer: nn.Module) -> Tensor:
        """Return rows minus the base's rows, [ids, dim], in the wider of both dtypes."""
        base = layer.get_parameter("weight").detach()[self.ids]
        wide = torch.promote_types(self.rows.dtype, base.dtype)
        return self.rows.to(wide) - base.to(wide)

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the name of the one tensor that a merge writes."""
        return ("weight",)

    def lower(self, layer: nn.Module) -> None:
        """There is no low-rank change; `write_rows` is all."""

    def write_rows(self, layer: nn.Module, weight: Tensor, factor: float) -> Tensor:
        """Return a stored weight [tokens, dim] with the change added `factor` times; alone at 1: exactly the rows."""
        before, base = weight[self.ids], layer.get_parameter("weight").detach()[self.ids]
        added = before + (factor * self.change(layer).detach()).to(weight)
        if factor == 1.0:
            # what others have not changed becomes the row itself, without the rounding of a difference
            added = torch.where(before == base.to(before), self.rows.detach().to(before), added)
        return weight.index_copy(0, self.ids, added)

    def extra_repr(self) -> str:
        """Show how many rows are trained."""
        return f"rows={len(self.ids)}"


class TiedRows(nn.Module):
    """The same rows on another layer that holds the same weight, such as the head of a tied embedding.

    Args:
        source: the delta that owns the rows; referred to, not registered, so that its parameter has one name.
    """

    shared = True
    """As in `RowsDelta`."""

    def __init__(self, source: RowsDelta) -> None:
        super().__init__()
        self.__dict__["source"] = source

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the source's change."""
        source: RowsDelta = self.__dict__["source"]
        changed: Tensor = source(x, y, layer, weight)
        return changed

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the name of the one tensor that a merge writes."""
        return ("weight",)

    def lower(self, layer: nn.Module) -> None:
        """There is no low-rank change."""

    def write_rows(self, layer: nn.Module, weight: Tensor, factor: float) -> Tensor:
        """Return a stored weight with the source's change added."""
        source: RowsDelta = self.__dict__["source"]
        return source.write_rows(layer, weight, factor)
