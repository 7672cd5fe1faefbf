"""The pair of an embedding on a head that holds the same weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sideroad.kinds.linear import Linear
from sideroad.lowrank import LowRank
from sideroad.methods.lora import LoraDelta


class TiedPair(nn.Module):
    """An embedding's change on an output head that is tied to it.

    The embedding's weight [tokens, dim] changes by s · (B A)ᵀ = s · Aᵀ Bᵀ, so the head, whose weight is the same
    matrix, has the pair A' = Bᵀ [rank, dim] and B' = Aᵀ [tokens, rank].

    Args:
        source: the embedding's delta; referred to, not registered, so that its parameters have one name.
    """

    shared = True
    """The change is that of everything that holds the weight: a merge writes it once and keeps the tie."""

    def __init__(self, source: LoraDelta) -> None:
        super().__init__()
        self.__dict__["source"] = source

    @property
    def source(self) -> LoraDelta:
        """The embedding's delta."""
        found: LoraDelta = self.__dict__["source"]
        return found

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the change; dropout zeroes elements of the head's own input."""
        source, kind = self.source, Linear()
        factor: Tensor | float = weight * source.scale
        if self.training and source.dropout > 0:
            x, kept = kind.dropped(x, source.dropout)
            factor = factor * kept
        return kind.add(layer, x, y, source.B.t(), source.A.t(), factor)

    def pair(self) -> dict[str, Tensor]:
        """Return the head's own A [rank, dim] and B [tokens, rank], as files hold them."""
        return {"A": self.source.B.detach().t(), "B": self.source.A.detach().t()}

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the name of the one tensor that a merge writes."""
        return ("weight",)

    def lower(self, layer: nn.Module) -> LowRank:
        """Return the change of the head's weight, s folded into B, in fp32 (fp64 where the factors are)."""
        wide = torch.promote_types(self.source.A.dtype, torch.float32)
        A, B = (tensor.to(wide) for tensor in self.pair().values())
        return LowRank(A, torch.mul(B, self.source.scale))
