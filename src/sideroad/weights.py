"""Dense read and write of any adaptable layer's weight, always seen as [out, in]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sideroad.errors import AdapterError, TargetError
from sideroad.kinds import ALLOWED, Kind, kind_of

CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
"""Norms whose output ends in `+ bias` over its second dimension, the channels."""
BIASED_NORMS = (nn.LayerNorm, *CHANNEL_NORMS)
"""Kinds besides adaptable layers whose output ends in `+ bias`; of the others over the last dimension."""


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a low-rank pair can act on this layer: one of the kinds of `sideroad.kinds` claims it."""
    return kind_of(layer) is not None


def require_kind(layer: nn.Module) -> Kind:
    """Return the layer's kind.

    Raises:
        TargetError: the layer is not adaptable.
    """
    kind = kind_of(layer)
    if kind is None:
        raise TargetError(
            f"{type(layer).__name__} has no weight that a low-rank pair can adapt; "
            f"allowed: {ALLOWED}, with a floating-point weight."
        )
    return kind


def has_trainable_bias(layer: nn.Module) -> bool:
    """Whether the layer's output ends in `+ bias`, with a bias there to train."""
    bias = layer._parameters.get("bias")
    kind = kind_of(layer)
    known = isinstance(layer, BIASED_NORMS) if kind is None else kind.bias == "bias"
    return known and bias is not None and bias.ndim == 1


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) features of an adaptable layer, whichever way it stores its weight.

    Raises:
        TargetError: the layer is not adaptable.
    """
    return require_kind(layer).shape(layer)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the stored weight parameter itself, in the layer's own orientation.

    Raises:
        TargetError: the layer is not adaptable.
    """
    return layer.get_parameter(require_kind(layer).weight)


def read_dense(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a fresh copy of the weight as [out, in], on the layer's device.

    Raises:
        TargetError: the layer is not adaptable.
    """
    weight = require_kind(layer).oriented(weight_of(layer).detach())
    return weight.to(dtype, copy=True, memory_format=torch.contiguous_format)


def write_dense(layer: nn.Module, weight: Tensor) -> None:
    """Overwrite the layer's weight in place from [out, in], rounding once to the layer's dtype.

    Raises:
        TargetError: the layer is not adaptable.
        AdapterError: the shape is not the layer's.
    """
    stored = weight_of(layer)
    if tuple(weight.shape) != layer_shape(layer):
        raise AdapterError(
            f"cannot write a weight of shape {list(weight.shape)} into {type(layer).__name__}; "
            f"it needs [out, in] = {list(layer_shape(layer))}."
        )
    with torch.no_grad():
        stored.copy_(stored_form(layer, weight))


def stored_form(layer: nn.Module, weight: Tensor) -> Tensor:
    """Turn an [out, in] weight into the shape and dtype in which the layer stores it."""
    return require_kind(layer).stored(layer, weight).to(weight_of(layer).dtype)
