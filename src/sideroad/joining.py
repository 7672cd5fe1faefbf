"""An adapter's parts onto a model and off again: which delta goes where."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.kinds.experts import ExpertWeight, holder_of, layer_at
from sideroad.methods import ROWS, make_delta, parts_of
from sideroad.methods.lora import BiasDelta, LoraDelta
from sideroad.methods.replaced import Replaced
from sideroad.methods.rows import RowsDelta, TiedRows
from sideroad.methods.tied import TiedPair
from sideroad.route import CHILD, Route, deltas_of, find_delta
from sideroad.seams import close_path, foreign_forward, open_path, strip
from sideroad.survey import Survey

State = Mapping[str, Mapping[str, Tensor]]
"""Module path → tensor name → tensor."""


@dataclass(frozen=True)
class Placed:
    """An adapter's tensors by a model's own paths, known to fit it, in model order.

    Args:
        tensors: layer path → `A`, `B`, `bias`, `rows`.
        modules: path of a module trained whole → its state.
        ties: path of a layer that shares a trained embedding's weight → path of that embedding.
    """

    tensors: State
    modules: State = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the layers that have a pair."""
        return tuple(path for path, parts in self.tensors.items() if "A" in parts)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of everything that has tensors."""
        return (*self.tensors, *self.modules)


def find_row_ties(survey: Survey, paths: Iterable[str]) -> dict[str, str]:
    """Return the other layers that hold the weight of embeddings or heads whose rows are trained: path → source.

    Raises:
        AdapterError: two of the given layers share their weight, or something shares it that rows cannot act on.
    """
    ties: dict[str, str] = {}
    wanted = list(paths)
    for path in wanted:
        weight = survey.modules[path].get_parameter("weight")
        for other, module in survey.modules.items():
            if other == path or survey.canonical[other] != other or module._parameters.get("weight") is not weight:
                continue
            if other in wanted:
                raise AdapterError(
                    f"{path} and {other} hold one weight, so their rows are the same; name the embedding alone."
                )
            if other not in survey.adaptable:
                raise AdapterError(
                    f"{other} ({type(module).__name__}) holds the weight of {path}, but trained rows cannot act in it."
                )
            ties[other] = path
    return ties


def make_deltas(model: nn.Module, config: AdapterConfig, placed: Placed) -> dict[str, nn.Module]:
    """Build the delta of every path, ties included; nothing is attached yet.

    Raises:
        AdapterError: dropout or slices that a layer cannot have.
    """
    made: dict[str, nn.Module] = {
        path: make_delta(config, path, layer_at(model, path), tensors) for path, tensors in placed.tensors.items()
    }
    for path, state in placed.modules.items():
        made[path] = Replaced(copy_of(model.get_submodule(path), state))
    for path, source in placed.ties.items():
        follower, own = _follower(made[source], model.get_submodule(path)), made.get(path)
        if isinstance(own, LoraDelta | BiasDelta) and isinstance(follower, TiedRows):
            own.beside = follower
        elif not isinstance(own, Replaced):
            made[path] = follower
    return made


def _follower(leader: nn.Module, layer: nn.Module) -> nn.Module:
    """Return what acts on a layer that is tied to the leader's."""
    if isinstance(leader, RowsDelta):
        return TiedRows(leader)
    assert isinstance(leader, LoraDelta | Replaced), "only rows, pairs and whole modules are followed"
    leader.shared = True
    if isinstance(leader, LoraDelta):
        return TiedPair(leader)
    twin = copy_of(layer, state_without_adapters(layer))
    twin.weight = leader.copy.get_parameter("weight")
    follower = Replaced(twin)
    follower.shared = True
    return follower


def copy_of(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module without adapters, holding the given state.

    Raises:
        AdapterError: tensors for a meta model, or a forward on the instance that would still run the original.
    """
    twin = strip(copy.deepcopy(module))
    for name, inner in twin.named_modules():
        forward = foreign_forward(inner)
        if forward is not None and forward is foreign_forward(module.get_submodule(name)):
            raise AdapterError(
                f"the forward of this {type(inner).__name__} was replaced by a function that would run the original in "
                "a copy too; attach the adapter first, or leave the module out of modules_to_save."
            )
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            if not tensor.is_meta:
                tensor.copy_(state[name])
            elif not state[name].is_meta:
                raise AdapterError("the base is on the meta device, but the adapter has tensors; load the base first.")
    return twin


def state_without_adapters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own state: its parameters and buffers, and nothing that adapters have added."""
    return {name: tensor for name, tensor in module.state_dict().items() if f".{CHILD}." not in f".{name}"}


def join(model: nn.Module, route: Route, key: str, deltas: Mapping[str, nn.Module], trainable: bool) -> None:
    """Put deltas on their layers under an adapter's key."""
    for path, delta in deltas.items():
        child = open_path(model, path, route, whole=isinstance(delta, Replaced))
        child.put(key, delta.requires_grad_(trainable), _stacked_name(model, path))


def part(model: nn.Module, key: str, paths: Iterable[str]) -> None:
    """Take an adapter's deltas off their layers; layers without any are as they were before the first."""
    for path in paths:
        deltas = deltas_of(holder_of(layer_at(model, path)))
        if deltas is not None:
            deltas.take(key, _stacked_name(model, path))
            if not deltas._modules:
                close_path(model, path)


def _stacked_name(model: nn.Module, path: str) -> str | None:
    """The parameter's name where the layer at a path is a stacked weight."""
    layer = layer_at(model, path)
    return layer.name if isinstance(layer, ExpertWeight) else None


def state_of(model: nn.Module, paths: Iterable[str], name: str) -> dict[str, dict[str, Tensor]]:
    """Return an attached adapter's live tensors by path.

    Raises:
        AdapterError: a layer was replaced after attach.
    """
    return {path: parts_of(find_delta(model, path, name)) for path in paths}


def start_rows(layer: nn.Module, ids: Iterable[int]) -> dict[str, Tensor]:
    """Return the rows of a weight that training starts from: copies of the base's."""
    weight = layer.get_parameter("weight").detach()
    return {ROWS: weight[torch.tensor(list(ids), device=weight.device)].clone()}
