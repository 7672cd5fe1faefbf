"""The projections of `nn.MultiheadAttention`, whose weights are read by the attention's own forward."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sideroad.errors import AdapterError
from sideroad.kinds.kind import Seam


class InProjection:
    """`nn.MultiheadAttention` itself: its fused q, k and v projection, `in_proj_weight` [3 * dim, dim].

    Attention with keys or values of another width keeps three weights apart and is not claimed.
    """

    name: str | None = None
    weight = "in_proj_weight"
    bias: str | None = None
    seam: Seam = "owner"
    linear = True

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is attention with one fused input projection."""
        weight = layer._parameters.get(self.weight)
        return isinstance(layer, nn.MultiheadAttention) and weight is not None and weight.is_floating_point()

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (out, in) of the projection."""
        rows, columns = layer.get_parameter(self.weight).shape
        return rows, columns

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the weight itself."""
        return weight

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the weight itself."""
        return weight

    def pair_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return [rank, in] and [out, rank]."""
        out_features, in_features = self.shape(layer)
        return (rank, in_features), (out_features, rank)

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Refuse: there is no branch whose input could be dropped."""
        return _no_branch()

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Refuse: the change goes into the weight for the call."""
        return _no_branch()

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Refuse, like `add`."""
        return _no_branch()


class OutProjection(InProjection):
    """The output projection inside `nn.MultiheadAttention`: a linear layer whose own forward is never called."""

    name = "attention-output"
    weight = "weight"
    bias = "bias"

    def claims(self, layer: nn.Module) -> bool:
        """Whether it has the class that torch gives to this projection alone."""
        weight = layer._parameters.get("weight")
        return isinstance(layer, NonDynamicallyQuantizableLinear) and weight is not None and weight.is_floating_point()


def _no_branch() -> NoReturn:
    raise AdapterError(
        "a projection of nn.MultiheadAttention has no branch of its own: its attention reads the changed weight. "
        "Call the attention, not its projection."
    )
