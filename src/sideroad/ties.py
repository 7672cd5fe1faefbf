"""Who else uses a layer's memory, and how a head and an embedding that share a weight part and meet again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sideroad.errors import MergeError, raise_findings
from sideroad.route import walk

FLAG = "tie_word_embeddings"
MAP = "all_tied_weights_keys"


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter: its path, itself, the parameter's name, and the bytes it covers."""

    path: str
    module: nn.Module
    part: str
    start: int
    end: int
    device: str


def owners_of(model: nn.Module) -> list[Owner]:
    """List every parameter of every module but ours with its place in memory, shared ones once per module."""
    found = []
    seen: set[int] = set()
    for path, module in walk(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        for part, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.numel():
                start = parameter.data_ptr()
                found.append(Owner(path, module, part, start, start + _extent(parameter), str(parameter.device)))
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def find_ties(
    model: nn.Module, changed: Iterable[tuple[str, str]], together: Iterable[tuple[str, str]] = ()
) -> dict[str, str]:
    """Return which layers must part from an embedding or head that shares their weight: path → path of the other.

    Args:
        changed: (module path, parameter name) of everything that a merge will write for its layer alone.
        together: of what it will write for all who share it (rows of a tied embedding).
    Raises:
        MergeError: a parameter is shared with anything else; the other user would change too. Lists all.
    """
    wanted, agreed = set(changed), set(together)
    owners = sorted(owners_of(model), key=lambda owner: (owner.device, owner.start))
    ties: dict[str, str] = {}
    findings: list[str] = []
    group: list[Owner] = []
    for owner in [*owners, None]:
        overlaps = owner and group and owner.device == group[0].device and owner.start < max(one.end for one in group)
        if owner and (overlaps or not group):
            group.append(owner)
            continue
        _judge(group, wanted, agreed, ties, findings)
        group = [owner] if owner else []
    raise_findings(MergeError, "merge refused", findings)
    return ties | _orphans(model, ties)


def _orphans(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """Layers that a transformers model ties to one that parts: they part too, or a file would tie them to it again."""
    parted = {f"{path}.weight": other for path, other in ties.items()}
    found = {}
    for prefix, module in walk(model) if ties else ():
        present = module.__dict__.get(MAP)
        dot = f"{prefix}." if prefix else ""
        for one, two in present.items() if isinstance(present, dict) else ():
            path, stays = (dot + one).removesuffix(".weight"), parted.get(dot + two)
            if stays not in (None, path) and path not in ties:
                found[path] = str(stays)
    return found


def _judge(
    group: list[Owner], wanted: set[tuple[str, str]], agreed: set[tuple[str, str]], ties: dict[str, str],
    findings: list[str],
) -> None:  # fmt: skip
    """Sort one group of parameters that share memory into ties and findings."""
    mine = [owner for owner in group if (owner.path, owner.part) in wanted]
    some = [owner for owner in group if (owner.path, owner.part) in agreed]
    if len(group) < 2 or not (mine or some) or (not mine and len(some) == len(group)):
        return
    embeddings = [owner for owner in group if isinstance(owner.module, nn.Embedding)]
    if mine and len(group) - len(embeddings) <= 1 and all(owner.part == "weight" for owner in group):
        stays = next((owner for owner in group if owner not in mine), embeddings[0])
        ties.update({owner.path: stays.path for owner in mine if owner is not stays})
        return
    mine = mine or some
    shown = ", ".join(f"{owner.path}.{owner.part}" for owner in group[:4]) + (", …" if len(group) > 4 else "")
    findings.append(
        f"{shown} are one tensor in memory (replicated or shared layers), so merging {mine[0].path} would change the "
        "others too. Use the adapter unmerged, or give each layer its own copy of the weight before attaching."
    )


@dataclass
class Untied:
    """What parting a head from its embedding changed in a model's bookkeeping, so that it can be put back."""

    ties: dict[str, str] = field(default_factory=dict)
    """Path of a layer that parted → path of the embedding or head whose weight it had."""
    configs: list[tuple[Any, bool]] = field(default_factory=list)
    """Configurations whose `tie_word_embeddings` was set to False."""
    maps: list[tuple[nn.Module, dict[str, str]]] = field(default_factory=list)
    """Modules whose map of tied names was cut, with the map as it was."""


def untie(model: nn.Module, ties: Mapping[str, str]) -> Untied:
    """Give each of the layers a weight parameter of its own (a copy), and tell a transformers model so.

    `tie_word_embeddings` becomes False, unless the model ties other weights by the same flag: then they would be lost
    when it is saved, and the flag stays (transformers reads two different weights as untied).
    """
    record = Untied(dict(ties))
    if not ties:
        return record
    for path in ties:
        layer = model.get_submodule(path)
        weight = layer.get_parameter("weight")
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    parted = {f"{path}.weight" for path in ties}
    others = False
    for prefix, module in walk(model):
        present = module.__dict__.get(MAP)
        if isinstance(present, dict) and present:
            dot = f"{prefix}." if prefix else ""
            rest = {one: two for one, two in present.items() if dot + one not in parted and dot + two not in parted}
            others = others or bool(rest)
            if len(rest) < len(present):
                record.maps.append((module, present))
                module.__dict__[MAP] = rest
    if not others:
        for config in _configs(model):
            record.configs.append((config, getattr(config, FLAG)))
            setattr(config, FLAG, False)
    return record


def retie(model: nn.Module, record: Untied) -> None:
    """Undo `untie`: the layers hold the others' own parameters again."""
    for path, other in record.ties.items():
        model.get_submodule(path).weight = model.get_submodule(other).get_parameter("weight")
    for config, flag in record.configs:
        setattr(config, FLAG, flag)
    for module, names in record.maps:
        module.__dict__[MAP] = names


def _configs(model: nn.Module) -> list[Any]:
    """The configurations in which a transformers model says that it is tied: its own, and those nested in it."""
    found: list[Any] = []
    pending = [module.config for _, module in walk(model) if getattr(module, "config", None) is not None]
    seen: set[int] = set()
    while pending:
        config = pending.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        pending += [value for value in getattr(config, "__dict__", {}).values() if hasattr(value, FLAG)]
        if getattr(config, FLAG, None) is True:
            found.append(config)
    return found
