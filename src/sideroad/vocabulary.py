"""Grown vocabularies: the rows beyond the base's own, and the recipe that makes room for them again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attached
from sideroad.errors import AdapterError
from sideroad.methods import ROWS, tokens_of
from sideroad.patterns import matches, shortest_names
from sideroad.survey import Survey

RECIPE = "vocabulary"
"""Key of an adapter's manifest: `{"from": rows of the base, "to": rows needed, "trained": {path: how many}}`. Of the
rows that a file holds for a path, so many come first that were trained; the others are the resized base's own."""


def with_grown_rows(survey: Survey, model: nn.Module, value: Adapter, base_rows: int) -> Adapter:
    """Add what a resized vocabulary has beyond the base's rows: those rows, trained or not, and the recipe.

    A whole embedding is hundreds of MB where the new rows are a few KB.

    Args:
        survey: of the model.
        model: resized with `resize_token_embeddings`; its output head is looked at too, unless it is tied.
        value: the adapter to be saved.
        base_rows: size of the base's vocabulary before it was resized.
    Raises:
        AdapterError: an embedding or head that has grown carries a low-rank pair, which rows cannot stand beside.
    """
    weights, tokens = dict(value.weights), dict(value.config.trainable_tokens)
    to, trained_rows = base_rows, dict[str, int]()
    for path, layer in vocabulary_layers(survey, model).items():
        weight = layer.get_parameter("weight").detach()
        to = max(to, weight.shape[0])
        if weight.shape[0] <= base_rows or path in value.modules:
            continue
        if "A" in weights.get(path, {}):
            raise AdapterError(
                f"{path} has grown from {base_rows} to {weight.shape[0]} rows and carries a low-rank pair; the new "
                "rows cannot be saved beside it. Train them with trainable_tokens instead of a pair, or save the layer "
                "whole with modules_to_save."
            )
        trained = tokens_of(value.config, path)
        new = tuple(one for one in range(base_rows, weight.shape[0]) if one not in trained)
        rows = weight[torch.tensor(new, dtype=torch.long, device=weight.device)].to("cpu", copy=True)
        held = weights.get(path, {}).get(ROWS)
        trained_rows[path] = len(trained)
        weights[path] = {ROWS: rows if held is None else torch.cat([held, rows.to(held.dtype)])}
        tokens = {_exact(survey, path): (*trained, *new)} | {
            pattern: ids for pattern, ids in tokens.items() if not (trained and matches(pattern, path))
        }
    if to == base_rows:
        return value
    return replace(
        value,
        weights={path: weights[path] for path in survey.modules if path in weights},
        config=value.config.model_copy(update={"trainable_tokens": tokens}),
        manifest={**value.manifest, RECIPE: {"from": base_rows, "to": to, "trained": trained_rows}},
    )


def grow(model: nn.Module, value: Adapter) -> bool:
    """Resize a model's vocabulary as an adapter's recipe says; return whether anything was done.

    The new rows are zero until the adapter acts, which holds them.

    Raises:
        AdapterError: the model's vocabulary is neither the base's nor the one needed, or it cannot be resized.
    """
    recipe = value.manifest.get(RECIPE)
    if not isinstance(recipe, Mapping):
        return False
    start, end = recipe.get("from"), recipe.get("to")
    if type(start) is not int or type(end) is not int or not 0 < start < end:
        raise AdapterError(f'"{RECIPE}" in sideroad.json is {recipe!r}; expected {{"from": rows, "to": more rows}}.')
    embedding = _ask(model, "get_input_embeddings")
    resize = getattr(model, "resize_token_embeddings", None)
    if embedding is None or not callable(resize):
        raise AdapterError(f"the adapter needs {end} token rows, but {type(model).__name__} cannot be resized.")
    have = embedding.get_parameter("weight").shape[0]
    if have == end:
        return False
    if have != start:
        raise AdapterError(
            f"the adapter was made for a base of {start} token rows, grown to {end}; this {type(model).__name__} has "
            f"{have}. Load the base as it was published."
        )
    _refuse_adapters(model)
    resize(end, mean_resizing=False)
    with torch.no_grad():
        for layer in vocabulary_layers(Survey(model), model).values():
            layer.get_parameter("weight")[start:] = 0
    return True


@contextmanager
def room_for(model: nn.Module, value: Adapter, *, trains_on: bool) -> Iterator[Adapter]:
    """Make room for an adapter's vocabulary while it is attached inside the block; undone if that fails.

    Args:
        trains_on: new rows that were not trained go into the base (`settle_untrained`), or act with the others.
    Yields:
        What is to be attached.
    """
    recipe = value.manifest.get(RECIPE)
    said = recipe.get("from") if isinstance(recipe, Mapping) else None
    start = said if type(said) is int else None
    layers = {} if start is None else vocabulary_layers(Survey(model), model)
    before = {path: _rows_from(layer, start) for path, layer in layers.items()}
    resized = grow(model, value)
    try:
        yield settle_untrained(model, value) if trains_on else value
    except BaseException:
        resize: Any = getattr(model, "resize_token_embeddings", None)
        if resized:
            resize(start, mean_resizing=False)
        for path, rows in before.items() if not resized and start is not None else ():
            with torch.no_grad():
                model.get_submodule(path).get_parameter("weight")[start:] = rows
        raise


def _rows_from(layer: nn.Module, start: int | None) -> Tensor:
    return torch.empty(0) if start is None else layer.get_parameter("weight").detach()[start:].clone()


def settle_untrained(model: nn.Module, value: Adapter) -> Adapter:
    """Write the new rows that were not trained into the resized base, and return the adapter with the trained ones.

    For training on: what was not a parameter of the adapter does not become one. An adapter that only acts needs no
    such thing: `attach` lets all its rows act, and the base stays as it is.
    """
    recipe = value.manifest.get(RECIPE)
    counts = recipe.get("trained") if isinstance(recipe, Mapping) else None
    if not isinstance(counts, Mapping):
        return value
    weights, tokens = dict(value.weights), dict(value.config.trainable_tokens)
    for path, leaves in value.weights.items():
        count = counts.get(path)
        if ROWS not in leaves or type(count) is not int or count >= leaves[ROWS].shape[0]:
            continue
        ids = tokens_of(value.config, path)
        own = model.get_submodule(path).get_parameter("weight")
        with torch.no_grad():
            own[torch.tensor(ids[count:], device=own.device)] = leaves[ROWS][count:].to(own)
        tokens = {pattern: held for pattern, held in tokens.items() if not matches(pattern, path)}
        rest = {leaf: tensor for leaf, tensor in leaves.items() if leaf != ROWS}
        if count:
            tokens[f"re:{re.escape(path)}"] = ids[:count]
            rest[ROWS] = leaves[ROWS][:count]
        weights[path] = rest
    weights = {path: leaves for path, leaves in weights.items() if leaves}
    return replace(value, weights=weights, config=value.config.model_copy(update={"trainable_tokens": tokens}))


def vocabulary_layers(survey: Survey, model: nn.Module) -> dict[str, nn.Module]:
    """Return the input embedding and, where it is not tied to it, the output head, by path."""
    found = [_ask(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    layers = [layer for layer in found if layer is not None and isinstance(layer._parameters.get("weight"), Tensor)]
    by_id = {id(module): path for path, module in reversed(survey.modules.items())}
    distinct = {id(layer.get_parameter("weight")): layer for layer in reversed(layers)}
    return {by_id[id(layer)]: layer for layer in reversed(distinct.values()) if id(layer) in by_id}


def _refuse_adapters(model: nn.Module) -> None:
    """Raise AdapterError where adapters sit on the embedding or head: resizing would take them off, layers and all."""
    handle = attached(model)
    layers = set() if handle is None else set(vocabulary_layers(handle.survey(), model))
    names = [] if handle is None else [name for name in handle.names if layers & set(handle.paths(name))]
    if names:
        raise AdapterError(
            f"the adapter needs a larger vocabulary, but {', '.join(names)} train the embedding or head of the present "
            "one. Load it onto a base of its own, or load it first."
        )


def _ask(model: nn.Module, name: str) -> nn.Module | None:
    ask: Any = getattr(model, name, None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, nn.Module) else None


def _exact(survey: Survey, path: str) -> str:
    return shortest_names([path], survey.modules)[0]
