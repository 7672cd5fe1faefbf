"""Convolutions: A is a convolution with the base's geometry, B a convolution of kernel 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from sideroad.kinds.kind import Seam, own_weight

CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d,
}  # fmt: skip


class Convolution:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: weight [out, in / groups, *kernel], seen as [out, in / groups * kernel].

    One pair for each group: A [groups * rank, in / groups, *kernel], B [out, rank, 1, ...]; with one group these are
    PEFT's shapes. PEFT's pair on a grouped layer has A [rank, in, *kernel], which sees all inputs, and B [out, rank /
    groups, 1, ...] (in old files [out, rank, 1, ...]); they act here too, but no grouped weight can hold them.
    """

    name: str | None = None
    weight = "weight"
    bias: str | None = "bias"
    seam: Seam = "hook"
    linear = False

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is a convolution of one of the three classes, with a plain weight and their forward."""
        weight = own_weight(layer)
        if weight is None or not isinstance(layer, CLASSES):
            return False
        # subclasses that standardise their weight or pad by themselves would not equal their merged weight
        if not any(type(layer).forward is known.forward for known in CLASSES):
            return False
        return tuple(weight.shape) == (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (out, in / groups * kernel)."""
        rows, columns = layer.get_parameter("weight").flatten(1).shape
        return rows, columns

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the weight flattened behind its first dimension."""
        return weight.flatten(1)

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the weight with its inputs and kernel apart."""
        return weight.reshape(layer.get_parameter("weight").shape)

    def pair_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return [groups * rank, in / groups, *kernel] and [out, rank, 1, ...]."""
        out_channels, *window = layer.get_parameter("weight").shape
        ones = (1,) * (len(window) - 1)
        return (_conv(layer).groups * rank, *window), (out_channels, rank, *ones)

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Zero single elements of x."""
        return functional.dropout(x, probability), 1.0

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Return y + factor · B * (A * x), A with the layer's stride, padding, dilation and padding mode."""
        conv = _conv(layer)
        convolve = _CONVOLVE[A.ndim - 2]
        groups = 1 if sees_all_inputs(layer, A) else conv.groups
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0  # type: ignore[assignment]
        low = convolve(x, A.to(x.dtype), None, conv.stride, padding, conv.dilation, groups)
        back = conv.groups if B.shape[1] * conv.groups == A.shape[0] else 1
        return y + convolve((low * factor).to(y.dtype), B.to(y.dtype), groups=back)

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the convolution of x without its bias."""
        conv = _conv(layer)
        return cast(Tensor, conv._conv_forward(x, conv.weight, None))

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Return the bias as [out, 1, ...]: outputs are channels, in front of the places."""
        return bias.reshape(-1, *[1] * len(_conv(layer).kernel_size))


def sees_all_inputs(layer: nn.Module, A: Tensor) -> bool:
    """Whether A is of PEFT's form on a grouped layer: every hidden channel sees all inputs, not those of one group."""
    conv = _conv(layer)
    return conv.groups > 1 and A.shape[1] == conv.in_channels


def _conv(layer: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    return cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", layer)
