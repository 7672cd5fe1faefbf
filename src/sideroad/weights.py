"""Dense read and write of any adaptable layer's weight, always seen as [out, in]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sideroad.errors import AdapterError, TargetError

BIASED_NORMS = (nn.LayerNorm,)
"""Kinds besides adaptable layers whose output ends in `+ bias` over the last dimension."""


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a low-rank pair can act on this layer: a plain `nn.Linear`, or the Conv1D of GPT-2.

    The layer's weight must be a floating-point parameter of the shape its class promises (packed and re-parametrised
    weights are not), and its forward must be what uses it: the output projection inside `nn.MultiheadAttention` has a
    class of its own because its forward is never called.
    """
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    if _is_conv1d(layer):
        return True
    if not isinstance(layer, nn.Linear) or isinstance(layer, NonDynamicallyQuantizableLinear):
        return False
    return tuple(weight.shape) == (layer.out_features, layer.in_features)


def has_trainable_bias(layer: nn.Module) -> bool:
    """Whether the layer's output ends in `+ bias` over its last dimension, with a bias there to train."""
    bias = layer._parameters.get("bias")
    return bias is not None and bias.ndim == 1 and (is_adaptable(layer) or isinstance(layer, BIASED_NORMS))


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) features of an adaptable layer, whichever way it stores its weight.

    Raises:
        TargetError: the layer is not adaptable.
    """
    rows, columns = weight_of(layer).shape
    return (columns, rows) if _is_conv1d(layer) else (rows, columns)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the stored weight parameter itself, in the layer's own orientation.

    Raises:
        TargetError: the layer is not adaptable.
    """
    weight = layer._parameters.get("weight")
    if weight is None or not is_adaptable(layer):
        raise TargetError(
            f"{type(layer).__name__} has no weight that a low-rank pair can adapt; "
            "allowed: nn.Linear and Conv1D with a floating-point weight."
        )
    return weight


def read_dense(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a fresh copy of the weight as [out, in], on the layer's device.

    Raises:
        TargetError: the layer is not adaptable.
    """
    weight = weight_of(layer).detach()
    oriented = weight.t() if _is_conv1d(layer) else weight
    return oriented.to(dtype, copy=True, memory_format=torch.contiguous_format)


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
    """Turn an [out, in] weight into the orientation and dtype in which the layer stores it."""
    return (weight.t() if _is_conv1d(layer) else weight).to(weight_of(layer).dtype)


def _is_conv1d(layer: nn.Module) -> bool:
    # transformers' class, known by structure so that this file does not import transformers: weight is [in, out].
    weight = layer._parameters.get("weight")
    features = getattr(layer, "nf", None)
    named_so = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)
    return named_so and weight is not None and weight.ndim == 2 and features == weight.shape[1]
