"""What a module computes, found out by asking it: a norm or a gated block is known by its results, not by its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sideroad.kernels.live import foreign_hook, refusal
from sideroad.kernels.pieces import Activation, NormStyle, gate, scaled

_ROWS = 4
_SEED = 20261124
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last dimension with a frozen weight."""

    weight: Tensor
    eps: float
    style: NormStyle


@dataclass(frozen=True)
class Gated:
    """A block that computes down(act(gate(x)) · up(x)), by the names of its layers."""

    gate: str
    up: str
    down: str
    activation: Activation


@torch.no_grad()
def match_norm(module: nn.Module) -> Norm | None:
    """Return an RMSNorm's parts if the module's results are exactly those of one; None otherwise."""
    weight = module._parameters.get("weight")
    eps = next((value for name in _EPS_NAMES if isinstance(value := getattr(module, name, None), float)), None)
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if weight is None or weight.ndim != 1 or eps is None or not alone or weight.requires_grad or foreign_hook(module):
        return None
    # small rows, on which eps acts, beside ordinary ones
    x = _draw(weight, weight.shape[0]) * weight.new_tensor([1.0, 1e-3, 30.0, 1.0])[:, None]
    expected = _ask(module, x)
    if expected is None or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    for style in get_args(NormStyle):
        if _equal(scaled(x, inverse, weight, style), expected):
            return Norm(weight, eps, style)
    return None


@torch.no_grad()
def match_gated(module: nn.Module) -> Gated | None:
    """Return the layers of a gated feed-forward block if that is what the module computes; None otherwise."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    layers = {name: child for name, child in children.items() if isinstance(child, nn.Linear) and not refusal(child)}
    others = [child for name, child in children.items() if name not in layers]
    if len(layers) != 3 or module._parameters or foreign_hook(module):
        return None
    if any(next(child.parameters(), None) is not None or foreign_hook(child) for child in others):
        return None
    for down, last in layers.items():
        first, second = (name for name in layers if name != down)
        entry = layers[first]
        same = (entry.in_features, entry.out_features) == (layers[second].in_features, layers[second].out_features)
        if not same or last.in_features != entry.out_features:
            continue
        x = _draw(entry.weight, entry.in_features)
        expected = _ask(module, x)
        if expected is None:
            return None
        for gate_name, up_name in ((first, second), (second, first)):
            e, g = layers[gate_name](x), layers[up_name](x)
            for activation in get_args(Activation):
                if _equal(layers[down](gate(e, g, activation)), expected):
                    return Gated(gate_name, up_name, down, activation)
    return None


@dataclass(frozen=True)
class Call:
    """One call of a layer during a forward pass."""

    name: str
    input: Tensor


@torch.no_grad()
def siblings(model: nn.Module, layers: dict[str, nn.Module], arguments: dict[str, Any]) -> list[tuple[str, ...]]:
    """Group the layers that are called one after another with the very same tensor, in the order of the calls.

    Found by running the model once; a layer that is called more than once is left out.
    """
    calls: list[Call] = []

    def note(name: str) -> Any:
        return lambda _module, given, named, _out: calls.append(Call(name, (*given, *named.values())[0]))

    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return _grouped(calls)


def _grouped(calls: Sequence[Call]) -> list[tuple[str, ...]]:
    names = [call.name for call in calls]
    groups: list[list[Call]] = []
    for call in calls:
        if names.count(call.name) > 1:
            continue
        if groups and groups[-1][0].input is call.input:
            groups[-1].append(call)
        else:
            groups.append([call])
    return [tuple(call.name for call in group) for group in groups]


def _draw(like: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(_ROWS, width, generator=generator).to(like.device, like.dtype)


def _ask(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        found = module(x)
    except Exception:  # a module that does not take one tensor is none of those looked for
        return None
    return found if isinstance(found, Tensor) else None


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.dtype in (torch.float32, torch.float64):
        return _close(found, expected)
    return torch.equal(found, expected)  # here rounding alone can tell two forms apart


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-5 if found.dtype in (torch.float32, torch.float64) else 2e-2
    scale = expected.float().abs().max().clamp_min(1e-20)
    return found.shape == expected.shape and bool((found.float() - expected.float()).abs().max() <= tolerance * scale)
