"""What a module computes, found out by asking it: a norm or a gated block is known by its results, not by its class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sideroad.kernels.live import foreign_hook, refusal
from sideroad.kernels.pieces import Activation, NormStyle, gate, scaled
from sideroad.modes import cuda_devices, in_eval_mode, in_train_mode
from sideroad.route import Deltas

MAGNITUDES = (1.0, 1e-3, 30.0, 1000.0)
"""Sizes of the rows that modules are asked about: clamps show on large ones, a norm's eps on small ones."""

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
    """A block that computes down(act(gate(x)) · up(x)), by the names of its layers.

    Attributes:
        gate_first: whether it calls `gate` before `up`, which matters where both draw dropout masks.
    """

    gate: str
    up: str
    down: str
    activation: Activation
    gate_first: bool


@torch.no_grad()
def match_norm(module: nn.Module) -> Norm | None:
    """Return an RMSNorm's parts if the module's results are exactly those of one; None otherwise."""
    weight = module._parameters.get("weight")
    eps = next((value for name in _EPS_NAMES if isinstance(value := getattr(module, name, None), float)), None)
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if weight is None or weight.ndim != 1 or eps is None or not alone or weight.requires_grad or foreign_hook(module):
        return None
    x = probe(weight, weight.shape[0])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    for style in get_args(NormStyle):
        if answers(module, x, scaled(x, inverse, weight, style)):
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
        if same and last.in_features == entry.out_features:
            found = _match_roles(module, layers, (first, second), down)
            if found is not None:
                return found
    return None


def _match_roles(
    module: nn.Module, layers: dict[str, nn.Linear], entry: tuple[str, str], down: str
) -> Gated | None:
    x = probe(layers[down].weight, layers[entry[0]].in_features)
    for gated, up in (entry, entry[::-1]):
        for activation in get_args(Activation):
            with in_eval_mode(module):
                e, g = layers[gated](x), layers[up](x)
                expected = layers[down](gate(e, g, activation))
            if answers(module, x, expected):
                order = called({name: layers[name] for name in entry}, lambda: module(x))
                return Gated(gated, up, down, activation, gate_first=order[0].name == gated)
    return None


def probe(like: Tensor, width: int) -> Tensor:
    """Return a row of random numbers for each of `MAGNITUDES`, on the device and in the type of a tensor."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(len(MAGNITUDES), width, generator=generator) * torch.tensor(MAGNITUDES)[:, None]
    return x.to(like.device, like.dtype)


def answers(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether a module gives these rows for x, in eval mode and, under any seed, in training mode too.

    A layer's own adapter may have dropout, which is not the module's: its deltas stay in eval mode.
    """
    for mode in (in_eval_mode, in_train_mode):
        with mode(module), eval_deltas(module), torch.random.fork_rng(devices=cuda_devices(module)):
            torch.manual_seed(_SEED)
            try:
                found = module(x)
            except Exception:  # a module that does not take one tensor is none of those looked for
                return False
            if not isinstance(found, Tensor) or not same(found, expected):
                return False
    return True


def eval_deltas(module: nn.Module) -> Any:
    """Keep the adapters inside a module in eval mode for the length of a block."""
    return in_eval_mode(nn.ModuleList([found for found in module.modules() if isinstance(found, Deltas)]))


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether rows are equal up to rounding, each measured by its own size; in all bits where a type is short."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype not in (torch.float32, torch.float64):
        return torch.equal(found, expected)  # rounding alone can tell two forms apart here
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return bool(((found - expected).abs() <= 1e-5 * scale).all())


@dataclass(frozen=True)
class Call:
    """One call of a layer during a forward pass."""

    name: str
    input: Tensor


def called(layers: dict[str, nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Return the calls of layers during a run, in order."""
    calls: list[Call] = []

    def note(name: str) -> Any:
        return lambda _module, given, named, _out: calls.append(Call(name, (*given, *named.values())[0]))

    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def siblings(model: nn.Module, layers: dict[str, nn.Module], arguments: dict[str, Any]) -> list[tuple[str, ...]]:
    """Group the layers that are called one after another with the very same tensor, in the order of the calls.

    Found by running the model once; a layer that is called more than once, or never, is left out.
    """
    return _grouped(called(layers, lambda: model(**arguments)))


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
