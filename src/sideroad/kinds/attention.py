"""The projections of `nn.MultiheadAttention`, whose weights are read by the attention's own forward."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sideroad.kinds.kind import Seam, own_weight
from sideroad.kinds.linear import Linear


class InProjection(Linear):
    """`nn.MultiheadAttention` itself: its fused q, k and v projection, `in_proj_weight` [3 * dim, dim].

    Attention with keys or values of another width keeps three weights apart and is not claimed.
    """

    weight = "in_proj_weight"
    bias = None
    seam: Seam = "owner"

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is attention with one fused input projection."""
        weight = layer._parameters.get(self.weight)
        return isinstance(layer, nn.MultiheadAttention) and weight is not None and weight.is_floating_point()


class OutProjection(Linear):
    """The output projection inside `nn.MultiheadAttention`: a linear layer whose own forward is never called."""

    name = "attention-output"
    seam: Seam = "owner"

    def claims(self, layer: nn.Module) -> bool:
        """Whether it has the class that torch gives to this projection alone."""
        return isinstance(layer, NonDynamicallyQuantizableLinear) and own_weight(layer) is not None
