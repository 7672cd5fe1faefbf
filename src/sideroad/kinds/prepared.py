"""Convolutions with a forward of their own that prepares the input first: TensorFlow's "same", or causal, padding."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sideroad.kinds.convolution import CLASSES, Convolution, convolution, has_a_known_forward

Input = Literal["as it is", "prepared"]

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_ANSWERS: WeakKeyDictionary[nn.Module, Input | None] = WeakKeyDictionary()


class PreparedConvolution(Convolution):
    """A subclass of `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` that does something to its input and then convolves it.

    As `Convolution`; A is convolved by the layer's own forward, so it sees what the layer's weight sees. What is done
    to the weight or after the convolution would be lost in a merge, so such a layer is not claimed (`asked`).
    """

    def claims(self, layer: nn.Module) -> bool:
        """Whether it has a forward of its own of which nothing but the input of one convolution is its own."""
        if not isinstance(layer, CLASSES) or has_a_known_forward(layer) or not self.has_its_shape(layer):
            return False
        return asked(layer) is not None

    def convolved(self, layer: nn.Module, x: Tensor, A: Tensor, groups: int) -> Tensor:
        """Return what the layer's own forward gives with A in place of its weight, and without bias."""
        found: Tensor = _forward(layer)(_view(layer, A, groups), x)
        return found


def asked(layer: nn.Module) -> Input | None:
    """Return whether a layer's own forward convolves its input prepared or as it is; None where it does more.

    The forward is run once per layer, on the meta device and a copy, and the convolutions that it calls are noted:
    there must be one, with the layer's weight and bias themselves, and what comes out of it must be what is returned.
    A forward that takes more than one tensor is not asked: what else it is given decides what it does.
    """
    if layer not in _ANSWERS:
        _ANSWERS[layer] = _ask(layer)
    return _ANSWERS[layer]


class _Noted(TorchFunctionMode):
    """Notes the convolutions that are called inside: their arguments by position, and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and note it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            names = ("input", "weight", "bias")
            given = [args[index] if index < len(args) else kwargs.get(name) for index, name in enumerate(names)]
            self.calls.append((given[0], given[1], given[2], out))
        return out


def _ask(layer: nn.Module) -> Input | None:
    conv = convolution(layer)
    if len(inspect.signature(_forward(layer)).parameters) != 2:
        return None
    kept = conv.get_parameter("weight")
    weight = torch.empty((conv.groups, *kept.shape[1:]), dtype=kept.dtype, device="meta")
    spans = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    sizes = [(kernel - 1) * dilation + 1 + 2 * stride for kernel, dilation, stride in spans]
    x = torch.empty((1, conv.in_channels, *sizes), dtype=kept.dtype, device="meta")
    try:
        view = _view(layer, weight, conv.groups)
        # copies: a norm among them would count the call
        view.__dict__["_modules"] = {
            name: None if child is None else copy.deepcopy(child).to("meta")
            for name, child in layer._modules.items()
            if name != "lora"
        }
        view.__dict__["_buffers"] = {
            name: None if one is None else one.to("meta") for name, one in layer._buffers.items()
        }
        with torch.no_grad(), _Noted() as noted:
            out = _forward(layer)(view, x)
    except Exception:
        return None
    if len(noted.calls) != 1:
        return None
    seen, used, bias, given = noted.calls[0]
    if used is not weight or bias is not None or out is not given:
        return None
    return "as it is" if seen is x else "prepared"


def _view(layer: nn.Module, weight: Tensor, groups: int) -> nn.Module:
    """Return a shallow copy of a convolution with another weight and without bias; the layer is not touched."""
    # not copy.copy: torch.compile does not follow a module's __setstate__
    view: nn.Module = object.__new__(type(layer))
    view.__dict__.update(layer.__dict__)
    view.__dict__["_parameters"] = {**layer._parameters, "weight": weight, "bias": None}
    view.__dict__["groups"] = groups
    return view


def _forward(layer: nn.Module) -> Any:
    return type(layer).forward
