"""What acts on a linear layer right now, in the form that the fast products take."""

from __future__ import annotations

import torch
from torch import nn

from sideroad.kernels.products import Pair, Projection
from sideroad.kinds import kind_of
from sideroad.kinds.experts import expert_weights
from sideroad.methods.dora import DoraDelta
from sideroad.methods.lora import BiasDelta, LoraDelta
from sideroad.methods.replaced import Replaced
from sideroad.route import Deltas, deltas_of


def projection_of(layer: nn.Module) -> Projection | str:
    """Return a linear layer and its live pair, or say why the layer must compute itself.

    It is asked for anew in every forward pass: adapters come, go, and are switched.
    """
    deltas = deltas_of(layer)
    if torch.is_autocast_enabled(layer.get_parameter("weight").device.type):
        return "runs under autocast"
    if deltas is None:
        return _plain(layer, None)
    if deltas.route.plan is not None:
        return "has an adapter for each row"
    live = [(deltas._modules[key], weight) for key, weight in deltas.route.live.items() if key in deltas._modules]
    if not live:
        return _plain(layer, None)
    if len(live) > 1:
        return "has several adapters acting at once"
    delta, weight = live[0]
    if isinstance(delta, DoraDelta):
        return "has a magnitude (DoRA)"
    if not isinstance(delta, LoraDelta):
        return "its bias is trained" if isinstance(delta, BiasDelta) else "is not adapted by a pair"
    if delta.bias is not None:
        return "its bias is trained"
    if delta.beside is not None:
        return "is tied to trained token rows"
    dropout = delta.dropout if delta.training else 0.0
    return _plain(layer, Pair(*delta.factors(), weight * delta.scale, dropout))


def refusal(layer: nn.Module) -> str | None:
    """Say why a layer can never be computed by the fast products; None if it can."""
    kind = kind_of(layer)
    if trained_whole(layer):
        return "is trained whole"
    if expert_weights(layer):
        return f"computes its experts itself, with changed weights ({type(layer).__name__})"
    if kind is None or not kind.linear:
        return f"is no linear layer ({type(layer).__name__})"
    if type(layer).forward is not nn.Linear.forward and isinstance(layer, nn.Linear):
        return f"has a forward of its own ({type(layer).__name__})"
    if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        return "has a weight that is trained"
    return foreign_hook(layer)


def trained_whole(module: nn.Module) -> bool:
    """Whether an adapter holds a copy of a module that is trained in its place."""
    deltas = deltas_of(module)
    return deltas is not None and any(isinstance(one, Replaced) for one in deltas._modules.values())


def foreign_hook(module: nn.Module) -> str | None:
    """Say which hook or forward somebody else has put on a module; None if there is none."""
    child = module._modules.get("lora")
    ours = child.handle.id if isinstance(child, Deltas) and child.handle is not None else None
    if set(module._forward_hooks) - {ours}:
        return "carries a forward hook"
    others = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in others):
        return "carries a hook"
    if "forward" in module.__dict__:
        return "has a forward that was replaced"
    return None


def _plain(layer: nn.Module, pair: Pair | None) -> Projection:
    kind = kind_of(layer)
    assert kind is not None, "refusal let only known kinds through"
    bias = layer._parameters.get("bias")
    return Projection(kind.oriented(layer.get_parameter("weight")), bias, pair)

