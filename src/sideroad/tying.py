"""Layers that hold a trained embedding's weight and follow it: output heads that are tied."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.joining import Placed, find_row_ties, state_of
from sideroad.methods import parts_of
from sideroad.methods.replaced import Replaced
from sideroad.methods.tied import TiedPair
from sideroad.roster import Entry
from sideroad.route import find_delta
from sideroad.survey import Survey


def find_followers(
    survey: Survey, config: AdapterConfig, tensors: Mapping[str, Collection[str]], modules: Iterable[str]
) -> dict[str, str]:
    """Return path → path of the embedding that it follows: rows always, pairs and whole copies if the config says so.

    Args:
        tensors: layer path → names of its tensors.
        modules: paths of modules trained whole.
    Raises:
        AdapterError: a follower that cannot act: no linear head, or one with more than the weight to copy.
    """
    ties = find_row_ties(survey, [path for path, parts in tensors.items() if "rows" in parts])
    if not config.tie_embeddings:
        return ties
    leaders = [path for path, parts in tensors.items() if "A" in parts] + list(modules)
    for path in leaders:
        if not isinstance(survey.modules[path], nn.Embedding):
            continue
        for other in survey.sharers(path):
            layer = survey.modules[other]
            own = [name for name, _ in layer.named_parameters() if "lora" not in name]
            if not isinstance(layer, nn.Linear) or (path in modules and own != ["weight"]):
                raise AdapterError(
                    f"{other} ({type(layer).__name__}) holds the weight of {path}, but cannot follow it; set "
                    "tie_embeddings (ensure_weight_tying) to false."
                )
            ties[other] = path
    return ties


def tying_findings(survey: Survey, config: AdapterConfig, leaders: Collection[str]) -> list[str]:
    """Return what is wrong with `tie_embeddings`: nothing that is trained has a weight that is tied.

    Args:
        leaders: paths of the layers and modules that are trained.
    """
    if not config.tie_embeddings or any(survey.sharers(path) for path in leaders):
        return []
    return [
        f"tie_embeddings (ensure_weight_tying) is set, but nothing that is trained in {survey.model_name} shares its "
        "weight with another layer; leave it out, or name the tied embedding."
    ]


def without_followers(survey: Survey, value: Adapter) -> Adapter:
    """Drop the tensors of followers from a value: files hold them beside the embedding's, so that others can read them.

    Raises:
        AdapterError: they are not those of the embedding.
    """
    if not value.config.tie_embeddings:
        return value
    weights, modules, wrong = dict(value.weights), dict(value.modules), []
    for path in [*value.weights, *value.modules]:
        if path not in survey.modules or survey.leader(path) == path:
            continue
        leader = survey.leader(path)
        pair, whole = weights.get(leader, {}), modules.get(leader)
        if path in modules and whole is not None:
            same = torch.equal(modules.pop(path)["weight"], whole["weight"])
        elif "A" in weights.get(path, {}) and "A" in pair:
            own = weights.pop(path)
            same = torch.equal(own["A"], pair["B"].t()) and torch.equal(own["B"], pair["A"].t())
        else:
            continue
        wrong += [] if same else [path]
    if wrong:
        raise AdapterError(
            f"{', '.join(wrong)} should follow a tied embedding (tie_embeddings, ensure_weight_tying), but the file "
            "holds other tensors for it. Set it to false to let both act by themselves."
        )
    return replace(value, weights=weights, modules=modules)


def held_state(model: nn.Module, entry: Entry, name: str) -> Placed:
    """Return the live tensors of an attached adapter, with what its followers hold in files."""
    weights = state_of(model, entry.layers, name)
    modules = state_of(model, entry.modules, name)
    for path in entry.ties:
        delta = find_delta(model, path, name)
        if isinstance(delta, TiedPair):
            weights[path] = delta.pair()
        elif isinstance(delta, Replaced):
            modules[path] = parts_of(delta)
    return Placed(weights, modules)


def on_cpu(held: Placed) -> Placed:
    """Return copies on the CPU."""
    return Placed(
        {path: _on_cpu(parts) for path, parts in held.tensors.items()},
        {path: _on_cpu(parts) for path, parts in held.modules.items()},
    )


def _on_cpu(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.to("cpu", copy=True) for part, tensor in parts.items()}
