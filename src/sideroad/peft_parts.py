"""What PEFT's configuration says beside pairs: whole modules, token rows, attention's output projection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.pairs import spread
from sideroad.patterns import is_name, matches
from sideroad.peft_fields import HEADS
from sideroad.peft_keys import OUTPUT, Sorted
from sideroad.peft_targets import ends, our_name, their_value


def peft_path(path: str, kinds: Mapping[str, str]) -> str:
    """Return the module that PEFT's configuration means for a path: of an output projection, its attention."""
    return path.rpartition(".")[0] if kinds.get(path) == OUTPUT else path


def output_patterns(
    patterns: Mapping[str, Any], default: Any, paths: Iterable[str], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Return PEFT's value for every output projection as exact patterns: its attention's, whatever its own name."""
    outputs = [path for path in paths if kinds.get(path) == OUTPUT] if patterns else []
    return {f"re:{re.escape(path)}": their_value(patterns, peft_path(path, kinds), default) for path in outputs}


def attention_findings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], kinds: Mapping[str, str | None]
) -> list[str]:
    """List the attentions whose projections have numbers of their own, which PEFT's files cannot say."""
    pairs = [(path.rpartition(".")[0], path) for path in ranks if kinds.get(path) == OUTPUT]
    return [
        f"{owner} and {path} have ranks {ranks[owner]} and {ranks[path]}, alpha {alphas[owner]:g} and "
        f"{alphas[path]:g}; PEFT's files have one of each for both: give both the same in rank_pattern, alpha_pattern"
        for owner, path in pairs
        if owner in ranks and (ranks[owner], alphas[owner]) != (ranks[path], alphas[path])
    ]


def file_rank(leaves: Mapping[str, Tensor], said: Any) -> int:
    """Return the rank of a pair; a convolution in groups has one for each group, or PEFT's one across all.

    Args:
        said: what the configuration says, which decides between the two.
    """
    A, B = leaves["A"], leaves["B"]
    return A.shape[0] if A.shape[0] == said and A.ndim > 2 else B.shape[1]


def file_ranks(
    fields: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]], kinds: Mapping[str, str]
) -> dict[str, int]:
    """Return the rank of every pair of a file."""
    pattern = fields.get("rank_pattern")
    said = pattern if isinstance(pattern, dict) else {}
    ranks = {}
    for path, leaves in weights.items():
        if "A" in leaves:
            grouped = leaves["A"].shape[0] != leaves["B"].shape[1]
            wanted = _said_value(said, peft_path(path, kinds), fields.get("r", 8)) if grouped else None
            ranks[path] = file_rank(leaves, wanted)
    return ranks


def said_rank(fields: Mapping[str, Any], path: str) -> int:
    """Return the rank that a configuration gives a path; 1 where it says something that is reported later."""
    pattern = fields.get("rank_pattern")
    said = _said_value(pattern if isinstance(pattern, dict) else {}, path, fields.get("r", 8))
    return said if type(said) is int and said > 0 else 1


def _said_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    try:
        return their_value(patterns, path, default)
    except (re.error, RecursionError, OverflowError):
        return default  # the broken pattern is reported when the configuration is read


def saved_names(fields: Mapping[str, Any]) -> list[str]:
    """Return the names in `modules_to_save`; anything but a list of strings is reported later."""
    found = fields.get("modules_to_save")
    if found is None:
        return list(HEADS.get(str(fields.get("task_type")), ()))
    return [name for name in found if isinstance(name, str) and name] if isinstance(found, list) else []


def unfold_slices(
    fields: dict[str, Any], weights: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read the pairs on slices of PEFT 0.1 and 0.2 (`enable_lora`) as ordinary pairs with zeros elsewhere.

    Those have A [slices * rank, in] and B [rows of the enabled slices, slices * rank / 2, 1]: the weight of a
    convolution in two groups, however many slices there are. Their s is alpha / rank.

    Returns:
        Fields and weights, with ranks and alpha of whole pairs; as given where nothing is folded.
    """
    enable, rank, alpha = fields.get("enable_lora"), fields.get("r"), fields.get("lora_alpha")
    known = isinstance(enable, list) and all(type(one) is bool for one in enable) and any(enable)
    if not known or type(rank) is not int or type(alpha) not in (int, float):
        return fields, weights
    assert isinstance(enable, list)
    assert isinstance(alpha, int | float)
    count, unfolded = sum(enable), dict(weights)
    for path, leaves in weights.items():
        B = leaves.get("B")
        if "A" in leaves and B is not None and B.ndim == 3 and B.shape[0] % (2 * count) == 0:
            rows, half = B.shape[0], B.shape[0] // 2
            parts = iter(spread(B.flatten(1), ((0, half), (half, rows)), rows).chunk(count))
            width = rows // count
            pieces = [next(parts) if one else B.new_zeros(width, 2 * B.shape[1]) for one in enable]
            unfolded[path] = {**leaves, "B": torch.cat(pieces)}
    return {**fields, "enable_lora": None, "r": rank * count, "lora_alpha": alpha * count}, unfolded


def module_findings(fields: Mapping[str, Any], held: Sorted, source: str) -> list[str]:
    """Return what is wrong with `modules_to_save`: not a list of names, or named modules that are not in the file."""
    said = fields.get("modules_to_save")
    if not (said is None or (isinstance(said, list) and all(isinstance(name, str) and name for name in said))):
        return [f"{source}: modules_to_save is {said!r}; expected a list of names or null"]
    if said and not held.modules:
        return [
            f"{source}: modules_to_save is {said!r}, but the file holds no such module: what was trained in it is "
            "lost. Fetch the file again or save the adapter again; without those modules, set modules_to_save to null"
        ]
    return []


def our_modules(fields: Mapping[str, Any], held: Sorted) -> list[str]:
    """Return our patterns for the modules that a file holds whole; names that mean none are dropped, as in PEFT."""
    names = [name for name in saved_names(fields) if any(ends(path, name) for path in held.modules)]
    covered = [path for path in held.modules if any(ends(path, name) for name in names)]
    return [our_name(name) for name in names] if len(covered) == len(held.modules) else [*map(our_name, held.modules)]


def their_modules(held: Sorted) -> list[str]:
    """Return `modules_to_save`: whole paths, since PEFT takes a name for every path that ends in its letters."""
    return list(held.modules)


def our_tokens(fields: Mapping[str, Any], held: Sorted, source: str) -> tuple[dict[str, list[int]], list[str]]:
    """Return path → ids of trained rows, and what is wrong with `trainable_token_indices`."""
    said = fields.get("trainable_token_indices")
    rows = {path: leaves["rows"] for path, leaves in held.weights.items() if "rows" in leaves}
    if said is None or said == [] or said == {}:
        return {}, [f"{source}: {path} has trained rows, but trainable_token_indices is not set" for path in rows]
    if not (_ids(said) or (isinstance(said, dict) and all(_ids(ids) for ids in said.values()))):
        return {}, [f"{source}: trainable_token_indices is {said!r}; expected a list of ids, or a mapping to lists"]
    found, findings = {}, []
    for path, tensor in rows.items():
        ids = said if isinstance(said, list) else next((i for name, i in said.items() if ends(path, name)), None)
        if ids is None:
            findings.append(f"{source}: {path} has trained rows, but trainable_token_indices does not name it")
        elif len(ids) != tensor.shape[0] or len(set(ids)) != len(ids):
            findings.append(
                f"{source}: {path} has {tensor.shape[0]} trained rows, but trainable_token_indices lists {len(ids)} ids"
                f"{', some of them twice' if len(set(ids)) != len(ids) else ''}"
            )
        else:
            found[our_name(path)] = ids
    if not rows:
        findings.append(f"{source}: trainable_token_indices is set, but the file holds no trained rows")
    return found, findings


def their_tokens(config: AdapterConfig, held: Sorted) -> dict[str, list[int]]:
    """Return `trainable_token_indices` by module: under the pattern where PEFT reads it alike, else by whole path."""
    found: dict[str, list[int]] = {}
    for path, leaves in held.weights.items():
        if "rows" in leaves:
            named = [(pattern, ids) for pattern, ids in config.trainable_tokens.items() if matches(pattern, path)]
            if not named:
                raise AdapterError(f"{path} has trained rows, but trainable_tokens has no pattern that means it.")
            pattern, ids = named[0]
            found[pattern if is_name(pattern) else path] = list(ids)
    return found


def follows_embedding(path: str, weights: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a head's pair is an embedding's pair turned round, which `ensure_weight_tying` adds to the file."""
    A, B = weights[path]["A"], weights[path]["B"]
    return any(
        other != path and "A" in leaves and _turned(A, leaves["B"]) and _turned(B, leaves["A"])
        for other, leaves in weights.items()
    )


def _turned(one: Tensor, other: Tensor) -> bool:
    return one.ndim == 2 and other.ndim == 2 and torch.equal(one, other.t())


def _ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(i) is int and i >= 0 for i in value)
