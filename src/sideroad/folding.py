"""What a method trains as the one ordinary pair that files hold, and back where that is possible."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sideroad.config import SUBTRACTED, AdapterConfig, LoraMethod, init_name
from sideroad.errors import AdapterError
from sideroad.pairs import blocks, compact, enabled, out_of, slices_of, spread
from sideroad.scaling import with_ranks
from sideroad.targets import rank_of

Weights = Mapping[str, Mapping[str, Tensor]]


def fold(config: AdapterConfig, weights: Weights) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    """Return an adapter of ordinary pairs (and magnitudes) that changes every weight in the same way.

    Pairs of slices are spread, with zeros outside their blocks, ranks added up; a start that is subtracted becomes the
    other half of a pair of twice the rank; singular values go into A, and triplets that are switched off are left out,
    with the layers that have none left. Every layer's s stays what it was.
    """
    found = {path: dict(leaves) for path, leaves in weights.items()}
    config = _fold_triplets(config, found) if config.method.kind == "adalora" else config
    ranks = {path: rank_of(config, path) for path, leaves in found.items() if "A" in leaves}
    changed = False
    for path in ranks:
        leaves, parts = found[path], slices_of(config, path)
        if "A0" in leaves:
            found[path] = _with_start(leaves)
            ranks[path], changed = found[path]["A"].shape[0], True
        elif parts is not None:
            out = out_of(parts, leaves["B"].shape[0])
            ranks[path], changed = leaves["B"].shape[1] * enabled(parts), True
            found[path] = {**leaves, "B": spread(leaves["B"], blocks(parts, out), out)}
    if changed:
        config = with_ranks(config, ranks).model_copy(update={"slices": {}})
    return config, found


def unfold(config: AdapterConfig, weights: Weights) -> dict[str, dict[str, Tensor]] | None:
    """Undo `fold` as the configuration says; None where the tensors are not of that form.

    What AdaLoRA has settled cannot be taken apart again: how the ranks were found is over.
    """
    if config.method.kind == "adalora":
        return None
    found = {path: dict(leaves) for path, leaves in weights.items()}
    starts = init_name(config.method.init) in SUBTRACTED
    for path, leaves in found.items():
        if not {"A", "B"} <= leaves.keys():
            continue
        A, B, parts = leaves["A"], leaves["B"], slices_of(config, path)
        if starts:
            rank = rank_of(config, path)
            if A.shape[0] != 2 * rank or B.shape[1] != 2 * rank:
                return None
            halves = {"A": A[:rank], "A0": A[rank:], "B": B[:, :rank], "B0": -B[:, rank:]}
            found[path] = {**leaves, **{name: half.contiguous() for name, half in halves.items()}}
        elif parts is not None:
            try:
                small = compact(B, blocks(parts, B.shape[0]))
            except AdapterError:
                return None
            if small is None:
                return None
            found[path] = {**leaves, "B": small}
    return found


def acting_pair(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the A and B of one layer whose product is what it adds, before s."""
    if "E" in leaves:
        leaves = _with_values(leaves, torch.arange(len(leaves["E"])))
    if "A0" in leaves:
        leaves = _with_start(leaves)
    return leaves["A"], leaves["B"]


def _with_start(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = {
        "A": torch.cat([leaves["A"], leaves["A0"]]),
        "B": torch.cat([leaves["B"], -leaves["B0"]], dim=1),
    }
    return {name: joined.get(name, tensor) for name, tensor in leaves.items() if name not in ("A0", "B0")}


def _with_values(leaves: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    A, B, E = leaves["A"], leaves["B"], leaves["E"]
    scaled = A[kept] * E[kept].view(-1, *[1] * (A.ndim - 1))
    joined = {"A": scaled, "B": B[:, kept].contiguous()}
    return {name: joined.get(name, tensor) for name, tensor in leaves.items() if name != "E"}


def _fold_triplets(config: AdapterConfig, found: dict[str, dict[str, Tensor]]) -> AdapterConfig:
    """Fold AdaLoRA's values in place; returns the configuration of the plain LoRA adapter that is left."""
    paths = [path for path, leaves in found.items() if "E" in leaves]
    alive = {path: found[path]["E"].flatten().nonzero().flatten() for path in paths}
    if not any(len(kept) for kept in alive.values()):
        # nothing is trained yet: one triplet of zero change stands for each layer
        alive = dict.fromkeys(paths, torch.zeros(1, dtype=torch.long))
    # a layer that has something beside its pair stays a target, with one triplet of zero change
    for path in paths:
        if not len(alive[path]) and found[path].keys() - {"A", "B", "E"}:
            alive[path] = torch.zeros(1, dtype=torch.long)
    gone = [path for path in paths if not len(alive[path])]
    for path in paths:
        found[path] = _with_values(found[path], alive[path].to(found[path]["E"].device))
        if path in gone:
            found[path] = {name: tensor for name, tensor in found[path].items() if name not in ("A", "B")}
        if not found[path]:
            del found[path]
    ranks = {path: len(kept) for path, kept in alive.items() if len(kept)}
    settled = with_ranks(config, ranks)
    shared = {name: getattr(settled.method, name) for name in ("rank", "alpha", "dropout", "scaling")}
    exclude = (*config.exclude, *(f"re:{re.escape(path)}" for path in gone))
    return settled.model_copy(update={"method": LoraMethod(**shared), "exclude": exclude})
