"""Whole weights that PEFT saved unasked: of embeddings and heads, and of layers beside their pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.joining import find_row_ties, state_without_adapters
from sideroad.methods import ROWS, tokens_of
from sideroad.peft_keys import BASE
from sideroad.survey import Survey
from sideroad.tensor_files import same_bits


def settle_copies(survey: Survey, value: Adapter) -> tuple[Adapter, list[tuple[str, str]]]:
    """Drop the copies that are the base's own weights; let the others replace the layer's, where that is exact.

    A resized vocabulary is saved so, with the rows trained in it: the whole weight then acts, rows in place.

    Returns:
        The adapter without copies, and (path, sentence) for each copy that cannot be honoured.
    """
    weights, modules = dict(value.weights), dict(value.modules)
    problems: list[tuple[str, str]] = []
    repeated = _repeated_rows(survey, value)
    for path, whole in value.weights.items():
        leaves = {leaf: tensor for leaf, tensor in whole.items() if leaf != ROWS or path not in repeated}
        weights[path] = leaves
        if BASE not in leaves:
            continue
        rest = {leaf: tensor for leaf, tensor in leaves.items() if leaf != BASE}
        weights[path] = rest
        layer = survey.modules.get(path)
        own = None if layer is None else layer._parameters.get("weight")
        if layer is None or own is None:
            problems.append((path, "has a whole weight in the file, but no such layer is in the model"))
        elif own.is_meta or _same(leaves[BASE], own):
            pass
        elif "A" in leaves:
            text = "holds a copy of the base's weight beside its pair, which is not this base's: made for another"
            problems.append((path, text))
        else:
            changed = _with_rows(leaves[BASE], leaves, tokens_of(value.config, path))
            shared = [path] if tuple(own.shape) != tuple(changed.shape) else [path, *_ties(survey, path)]
            for one in shared:
                modules[one] = {**state_without_adapters(survey.modules[one]), "weight": changed}
            weights[path] = {leaf: tensor for leaf, tensor in rest.items() if leaf != ROWS}
    settled = {path for path, leaves in value.weights.items() if BASE in leaves} | repeated
    kept = {path: leaves for path, leaves in weights.items() if leaves or path not in settled}
    return replace(value, weights=kept, modules=modules), problems


def _repeated_rows(survey: Survey, value: Adapter) -> set[str]:
    """Paths whose trained rows repeat, bit for bit, those of an embedding that holds the same weight.

    PEFT writes the rows of a tied head a second time where it saves embedding layers.
    """
    rows = {path: leaves[ROWS] for path, leaves in value.weights.items() if ROWS in leaves}
    held = {path: survey.modules[path]._parameters.get("weight") for path in rows if path in survey.modules}
    embeddings = [path for path in held if isinstance(survey.modules[path], nn.Embedding)]
    return {
        path
        for path, weight in held.items()
        for source in embeddings
        if path not in embeddings
        and weight is not None
        and held[source] is weight
        and tokens_of(value.config, path) == tokens_of(value.config, source)
        and same_bits(rows[path], rows[source])
    }


def _same(copy: Tensor, own: Tensor) -> bool:
    """Whether a copy holds a weight's values, in the narrower of both types."""
    if copy.shape != own.shape:
        return False
    narrow = min(copy.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(copy.to(own.device, narrow), own.detach().to(narrow))


def _with_rows(weight: Tensor, leaves: Mapping[str, Tensor], ids: tuple[int, ...]) -> Tensor:
    if ROWS not in leaves:
        return weight
    return weight.index_copy(0, torch.tensor(ids), leaves[ROWS].to(weight))


def _ties(survey: Survey, path: str) -> list[str]:
    return list(find_row_ties(survey, [path]))
