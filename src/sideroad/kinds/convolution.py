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
        # subclasses that standardise their weight would not equal their merged weight; some others: kinds/prepared.py
        return isinstance(layer, CLASSES) and has_a_known_forward(layer) and self.has_its_shape(layer)

    def has_its_shape(self, layer: nn.Module) -> bool:
        """Whether the layer has a floating-point weight of its own, of the shape that its other attributes promise."""
        weight, conv = own_weight(layer), convolution(layer)
        if weight is None:
            return False
        return tuple(weight.shape) == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)

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
        return (convolution(layer).groups * rank, *window), (out_channels, rank, *ones)

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Zero single elements of x."""
        return functional.dropout(x, probability), 1.0

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Return y + factor · B * (A * x), A with the layer's stride, padding, dilation and padding mode."""
        conv = convolution(layer)
        low = self.convolved(layer, x, A.to(x.dtype), 1 if sees_all_inputs(layer, A) else conv.groups)
        back = conv.groups if B.shape[1] * conv.groups == A.shape[0] else 1
        return y + _CONVOLVE[A.ndim - 2]((low * factor).to(y.dtype), B.to(y.dtype), groups=back)

    def convolved(self, layer: nn.Module, x: Tensor, A: Tensor, groups: int) -> Tensor:
        """Return A * x."""
        conv = convolution(layer)
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0  # type: ignore[assignment]
        return _CONVOLVE[A.ndim - 2](x, A, None, conv.stride, padding, conv.dilation, groups)

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the convolution of x without its bias."""
        conv = convolution(layer)
        return self.convolved(layer, x, conv.weight, conv.groups)

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Return the bias as [out, 1, ...]: outputs are channels, in front of the places."""
        return bias.reshape(-1, *[1] * len(convolution(layer).kernel_size))


def sees_all_inputs(layer: nn.Module, A: Tensor) -> bool:
    """Whether A is of PEFT's form on a grouped layer: every hidden channel sees all inputs, not those of one group."""
    conv = convolution(layer)
    return conv.groups > 1 and A.shape[1] == conv.in_channels


def has_a_known_forward(layer: nn.Module) -> bool:
    """Whether a layer's forward is that of `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
    return any(type(layer).forward is known.forward for known in CLASSES)


def convolution(layer: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Return a layer that is known to be a convolution, as one."""
    return cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", layer)
