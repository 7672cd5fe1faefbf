"""Deltas into weights and back: fp32 sums, one rounding, the stored bytes kept for the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from sideroad.errors import MergeError
from sideroad.interrupts import uninterrupted
from sideroad.lowrank import LowRank
from sideroad.methods import Delta
from sideroad.ties import Untied, find_ties, retie, untie
from sideroad.weights import read_dense, stored_form, weight_of

Parts = Mapping[str, Sequence[tuple[nn.Module, float]]]
"""Module path → the (delta, weight) pairs that are merged into that module."""

Kept = dict[str, dict[str, Tensor]]
"""Module path → parameter name → CPU copy."""


@dataclass
class Merged:
    """A merge that has happened, with what it takes to undo it."""

    weights: dict[str, float]
    """Adapter key → weight."""
    before: tuple[dict[str, float], dict[str, float]]
    """The route's `active` and `live` at the time."""
    kept: Kept | None
    """The base's bytes; None where they were not kept."""
    untied: Untied
    aside: Kept | None = None
    """The merged bytes, while the base's are swapped in."""


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
    layers = {path: model.get_submodule(path) for path in parts}
    names = {path: changed_parameters(pairs) for path, pairs in parts.items()}
    empty = [path for path, layer in layers.items() if any(layer.get_parameter(name).is_meta for name in names[path])]
    if empty:
        raise MergeError(f"{empty[0]} is on the meta device: there is no weight to merge into; load the model first.")
    ties = find_ties(model, [(path, name) for path, found in names.items() for name in found])
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
        # a weight that is tied again holds the base's bytes already: the embedding never changed
        own = {name: value for name, value in parameters.items() if name != "weight" or path not in untied.ties}
        write_parameters(model.get_submodule(path), own)


def changed_parameters(pairs: Sequence[tuple[nn.Module, float]]) -> tuple[str, ...]:
    """Return which of a layer's parameters its deltas change: `weight`, `bias`, or both."""
    parts = {part for delta, _ in pairs for part in delta._parameters if delta._parameters[part] is not None}
    return tuple(name for name, needed in (("weight", parts - {"bias"}), ("bias", parts & {"bias"})) if needed)


def merged_parameters(layer: nn.Module, pairs: Sequence[tuple[nn.Module, float]]) -> dict[str, Tensor]:
    """Compute a layer's merged parameters in fp32 (fp64 for an fp64 base), rounded once to how they are stored."""
    result: dict[str, Tensor] = {}
    lowered = ((cast(Delta, delta).lower(layer), weight) for delta, weight in pairs)
    changes = [low.scaled(weight) for low, weight in lowered if low is not None]
    if changes:
        change: LowRank = reduce(LowRank.add, changes)
        dense = read_dense(layer, torch.promote_types(weight_of(layer).dtype, torch.float32))
        result["weight"] = stored_form(layer, change.apply_to(dense))
    biases = [(delta.get_parameter("bias"), w) for delta, w in pairs if delta._parameters.get("bias") is not None]
    if biases:
        base = layer.get_parameter("bias").detach()
        wide = torch.promote_types(base.dtype, torch.float32)
        # (1 - Σw) b + Σ w b': exactly b' for one adapter of weight 1
        total = base.to(wide) * (1 - sum(weight for _, weight in biases))
        total = total + sum(bias.detach().to(wide) * weight for bias, weight in biases)
        result["bias"] = total.to(base.dtype)
    return result


def copy_parameters(layer: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return CPU copies of some of a layer's parameters."""
    return {name: layer.get_parameter(name).detach().to("cpu", copy=True) for name in names}


def write_parameters(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Overwrite some of a layer's parameters in place."""
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value)


def swap(model: nn.Module, values: Mapping[str, Mapping[str, Tensor]]) -> Kept:
    """Write values into the model, all or none, and return CPU copies of what they replaced."""
    layers = {path: model.get_submodule(path) for path in values}
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
        for name, value in merged_parameters(layer, parts[path]).items():
            if not bool(torch.isfinite(value).all()):
                broken.append(f"{path}.{name} ({str(value.dtype).removeprefix('torch.')})")
    if broken:
        raise MergeError(
            f"merging would write values that are not finite into {len(broken)} parameters: {', '.join(broken)}. "
            "Nothing was changed. The adapter holds NaN or Inf, or its change is too large for the base's dtype."
        )
