"""The LoRA delta, and the bias delta that may stand beside it or alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sideroad.lowrank import LowRank


class LoraDelta(nn.Module):
    """Low-rank update of one layer (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

        y' = y + s · B A dropout(x)        and with a trained bias b':   + (b' - b)

    The products run in the input's dtype: the factors are cast, the input never is, so layers that read one input
    share one saved activation. While B is zero, y' equals y in every element (a -0.0 may become 0.0). Dropout acts on
    the branch's input alone, while this module is in training mode.

    Args:
        A: [rank, in]; taken as it is, its dtype is the storage dtype.
        B: [out, rank].
        scale: s.
        dropout: probability of zeroing an input element.
        bias: [out], or None where the bias is not trained.
    """

    def __init__(self, A: Tensor, B: Tensor, *, scale: float, dropout: float = 0.0, bias: Tensor | None = None) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times this delta.

        Args:
            x: the layer's input, [..., in].
            y: the layer's own output, [..., out], perhaps with other deltas added.
            layer: the adapted layer; its bias is read, it is not called.
        """
        if self.bias is not None:
            y = add_bias_change(y, self.bias, layer, weight)
        if self.training and self.dropout > 0:
            x = functional.dropout(x, self.dropout)
        low = functional.linear(x, self.A.to(x.dtype)).to(y.dtype)
        B = self.B.to(y.dtype)
        # one fused product-and-add: a single rounding, and no [..., out] temporary
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), B.t(), alpha=weight * self.scale)
        return flat.view(y.shape)

    def lower(self, layer: nn.Module) -> LowRank:
        """Return the change of the layer's weight, s folded into B, in fp32."""
        return LowRank(self.A.detach().float(), self.B.detach().float() * self.scale)

    def extra_repr(self) -> str:
        """Show rank, scale and dropout in the model's printout."""
        return f"rank={self.A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


class BiasDelta(nn.Module):
    """A trained bias on a layer that has no pair: `y' = y + (b' - b)`.

    Args:
        bias: b', [out].
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the bias change; x is not used."""
        return add_bias_change(y, self.bias, layer, weight)

    def lower(self, layer: nn.Module) -> None:
        """There is no low-rank change; `bias` is all."""


def add_bias_change(y: Tensor, bias: Tensor, layer: nn.Module, weight: float) -> Tensor:
    """Return y + weight · (bias - layer.bias), the difference taken in the wider dtype: exactly y where they agree."""
    base = layer.get_parameter("bias")
    wide = torch.promote_types(bias.dtype, base.dtype)
    return y + (weight * (bias.to(wide) - base.to(wide))).to(y.dtype)
