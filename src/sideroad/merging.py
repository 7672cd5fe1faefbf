"""Deltas into weights and back: fp32 sums, one rounding, the stored bytes kept for the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sideroad.errors import MergeError
from sideroad.interrupts import uninterrupted
from sideroad.kinds import kind_of
from sideroad.kinds.experts import Experts, ExpertWeight, layer_at
from sideroad.lowrank import changed
from sideroad.methods import Delta, acting
from sideroad.methods.lora import LoraDelta
from sideroad.methods.replaced import Replaced
from sideroad.methods.rows import RowsDelta, TiedRows
from sideroad.route import find_delta
from sideroad.ties import Untied, find_ties, retie, untie
from sideroad.weights import read_dense, require_kind, weight_of

Pairs = Sequence[tuple[nn.Module, float]]
"""The deltas of one module, each with its weight."""

Parts = Mapping[str, Pairs]
"""Module path → the deltas that are merged into that module."""

Kept = dict[str, dict[str, Tensor]]
"""Module path → tensor name (dotted, below the module) → CPU copy."""


@dataclass
class Merged:
    """A merge that has happened, with what it takes to undo it."""

    weights: dict[str, float]
    """Adapter key → weight."""
    before: dict[str, float]
    """The route's `live` at the time."""
    kept: Kept | None
    """The base's bytes; None where they were not kept."""
    untied: Untied
    aside: Kept | None = None
    """The merged bytes, while the base's are swapped in."""


def gather_parts(model: nn.Module, places: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> Parts:
    """Return what several adapters change, by module path.

    Args:
        places: adapter name → paths of the modules that it acts on.
        weights: adapter name → weight.
    """
    parts: dict[str, list[tuple[nn.Module, float]]] = {}
    for name, paths in places.items():
        for path in paths:
            found = acting(find_delta(model, path, name))
            parts.setdefault(path, []).extend((delta, weights[name]) for delta in found)
    return parts


def merge_into(model: nn.Module, parts: Parts, *, keep_base: bool) -> tuple[Kept | None, Untied]:
    """Add deltas to the layers' own weights; all or nothing.

    Everything is computed and checked before the first weight is written.

    Args:
        keep_base: keep a CPU copy of each changed parameter, which `restore` writes back bit for bit.
    Returns:
        The copies (None without `keep_base`), and what was untied.
    Raises:
        MergeError: memory shared with another layer, weights without data, or a result that is not finite.
    """
    layers = {path: layer_at(model, path) for path in parts}
    names = {path: changed_tensors(layers[path], pairs) for path, pairs in parts.items()}
    empty = [path for path, layer in layers.items() if any(tensor_of(layer, name).is_meta for name in names[path])]
    if empty:
        raise MergeError(f"{empty[0]} is on the meta device: there is no weight to merge into; load the model first.")
    shared = {path for path in layers if all(getattr(delta, "shared", False) for delta, _ in parts[path])}
    written = [_held_at(layers[path], path, name) for path in layers if path not in shared for name in names[path]]
    ties = find_ties(model, written, [place(path, "weight") for path in shared])
    layers = _without_followers(layers, shared - ties.keys())
    parts = {path: parts[path] for path in layers}
    _refuse_non_finite(layers, parts)
    kept = {path: copy_parameters(layer, names[path]) for path, layer in layers.items()} if keep_base else None
    untied = untie(model, ties)
    try:
        for path, layer in layers.items():
            write_parameters(layer, merged_parameters(layer, parts[path]))
    except BaseException as error:
        if kept is None:
            raise MergeError(
                f"merging stopped half-way ({type(error).__name__}) and the base was not kept: load the model again."
            ) from error
        restore(model, kept, untied)
        raise
    return kept, untied


@contextmanager
def base_instead(model: nn.Module, merged: Merged | None) -> Iterator[None]:
    """Put the base's bytes in place of the merged ones inside a block; nothing to do where none are merged.

    Raises:
        MergeError: the base's bytes were not kept.
    """
    if merged is None or merged.aside is not None:
        yield
        return
    if merged.kept is None:
        raise MergeError("the base was merged with keep_base=False: its weights are gone; load the base again.")
    try:
        with uninterrupted():
            merged.aside = swap(model, merged.kept)
        yield
    finally:
        if merged.aside is not None:
            with uninterrupted():
                swap(model, merged.aside)
                merged.aside = None


def restore(model: nn.Module, kept: Mapping[str, Mapping[str, Tensor]], untied: Untied) -> None:
    """Write kept bytes back and tie again what was tied."""
    retie(model, untied)
    for path, parameters in kept.items():
        write_parameters(layer_at(model, path), parameters)


def changed_tensors(layer: nn.Module, pairs: Pairs) -> tuple[str, ...]:
    """Return which of a module's tensors its deltas change, by dotted name."""
    return tuple(dict.fromkeys(name for delta, _ in pairs for name in cast(Delta, delta).changed(layer)))


def merged_parameters(layer: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """Compute a layer's merged tensors in fp32 (fp64 for an fp64 base), rounded once to how they are stored."""
    if isinstance(kind_of(layer), Experts):
        return {require_kind(layer).weight: _merged_experts(layer, pairs)}
    result: dict[str, Tensor] = {}
    for delta, _ in pairs:
        if isinstance(delta, Replaced):
            result.update({name: tensor.detach() for name, tensor in delta.tensors().items()})
    lowered = [(cast(Delta, delta).lower(layer), weight) for delta, weight in pairs if not isinstance(delta, Replaced)]
    changes = [(low, weight) for low, weight in lowered if low is not None]
    rows = [(delta, weight) for delta, weight in pairs if isinstance(delta, RowsDelta | TiedRows)]
    if changes or rows:
        wide = torch.promote_types(weight_of(layer).dtype, torch.float32)
        stored = changed(read_dense(layer, wide), changes)
        stored = require_kind(layer).stored(layer, stored)
        for delta, weight in rows:
            stored = delta.write_rows(layer, stored, weight)
        result[require_kind(layer).weight] = stored.to(weight_of(layer).dtype)
    biases = [(delta.get_parameter("bias"), w) for delta, w in pairs if delta._parameters.get("bias") is not None]
    if biases:
        base = layer.get_parameter("bias").detach()
        wide = torch.promote_types(base.dtype, torch.float32)
        # (1 - Σw) b + Σ w b': exactly b' for one adapter of weight 1
        total = base.to(wide) * (1 - sum(weight for _, weight in biases))
        total = total + sum(bias.detach().to(wide) * weight for bias, weight in biases)
        result["bias"] = total.to(base.dtype)
    return result


def _merged_experts(layer: nn.Module, pairs: Pairs) -> Tensor:
    """The sum expert by expert, exactly as the forward takes it; one matrix for all would be mostly zeros."""
    weight = weight_of(layer).detach()
    changed = weight
    for delta, factor in pairs:
        changed = cast(LoraDelta, delta).changed_weight(changed, factor).detach()
    return changed.to(weight.dtype)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return a module's parameter or buffer by dotted name."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    found = owner._parameters.get(leaf)
    return owner.get_buffer(leaf) if found is None else found


def place(path: str, name: str) -> tuple[str, str]:
    """Return (path of the module that holds a tensor itself, its name there)."""
    whole = f"{path}.{name}" if path else name
    owner, _, leaf = whole.rpartition(".")
    return owner, leaf


def _held_at(layer: nn.Module, path: str, name: str) -> tuple[str, str]:
    """As `place`; a stacked weight is a parameter of the experts module."""
    if isinstance(layer, ExpertWeight):
        return path.removesuffix(layer.name).removesuffix("."), layer.name
    return place(path, name)


def _without_followers(layers: Mapping[str, nn.Module], shared: set[str]) -> dict[str, nn.Module]:
    """Leave out layers of `shared` whose very weight an earlier one of them holds: the same change is written once."""
    written: set[int] = set()
    kept = {}
    for path, layer in layers.items():
        weight = id(weight_of(layer)) if path in shared else None
        if weight is None or weight not in written:
            kept[path] = layer
        if weight is not None:
            written.add(weight)
    return kept


def copy_parameters(layer: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return CPU copies of some of a module's tensors."""
    return {name: tensor_of(layer, name).detach().to("cpu", copy=True) for name in names}


def write_parameters(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Overwrite some of a module's tensors in place."""
    with torch.no_grad():
        for name, value in values.items():
            tensor_of(layer, name).copy_(value)


def swap(model: nn.Module, values: Mapping[str, Mapping[str, Tensor]]) -> Kept:
    """Write values into the model, all or none, and return CPU copies of what they replaced."""
    layers = {path: layer_at(model, path) for path in values}
    replaced = {path: copy_parameters(layer, tuple(values[path])) for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            write_parameters(layer, values[path])
    except BaseException:
        for path, layer in layers.items():
            write_parameters(layer, replaced[path])
        raise
    return replaced


def _refuse_non_finite(layers: Mapping[str, nn.Module], parts: Parts) -> None:
    broken = []
    for path, layer in layers.items():
        if _surely_finite(layer, parts[path]):
            continue
        for name, value in merged_parameters(layer, parts[path]).items():
            if not bool(torch.isfinite(value).all()):
                broken.append(f"{path}.{name} ({str(value.dtype).removeprefix('torch.')})")
    if broken:
        raise MergeError(
            f"merging would write values that are not finite into {len(broken)} parameters: {', '.join(broken)}. "
            "Nothing was changed. The adapter holds NaN or Inf, or its change is too large for the base's dtype."
        )


def _surely_finite(layer: nn.Module, pairs: Pairs) -> bool:
    """Whether a bound shows that a merge stays finite, which saves computing it a second time; False proves nothing."""
    deltas = [delta for delta, _ in pairs]
    if any(isinstance(delta, Replaced | RowsDelta | TiedRows) for delta in deltas):
        return False
    if any(delta._parameters.get("bias") is not None for delta in deltas):
        return False
    weight = weight_of(layer).detach()
    lowest, highest = weight.aminmax()
    size = torch.maximum(-lowest, highest).double()
    for delta, factor in pairs:
        if isinstance(delta, LoraDelta):
            size = size + abs(factor) * delta.bound(layer)
            continue
        low = cast(Delta, delta).lower(layer)
        size = size + (0.0 if low is None else abs(factor) * low.bound())
    # a NaN anywhere makes the comparison false; half of the largest number leaves room for rounding
    return bool(size < torch.finfo(weight.dtype).max / 2)
