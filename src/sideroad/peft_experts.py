"""Pairs on the stacked weights of fused experts, as PEFT's files hold them (its `target_parameters`).

PEFT wraps an experts module once for each parameter, in the order in which the module has them, so the file names a
pair by how deep it lies: `experts.lora_A` is the last parameter's, `experts.base_layer.lora_A` the one's before it.
A is [experts * rank, in] with the expert slowest, B is [out, rank * experts] with the expert fastest. In memory B is
[experts * out, rank] (`kinds/experts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from sideroad.errors import AdapterError
from sideroad.peft_keys import EXPERTS, Sorted
from sideroad.peft_targets import ends

ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""Order in which experts modules have their stacked weights. A file does not say which of two pairs is whose; these
names, which are those of transformers, do."""

_DEEPER = ".base_layer"
_NESTED = re.compile(r"(?:\.base_layer)+$")


def unfold_experts(held: Sorted, targets: Iterable[str], rank_of: Callable[[str], int]) -> list[str]:
    """Give the pairs of stacked weights the paths of these weights, and B the form it has in memory; in place.

    Args:
        held: as `peft_keys.from_tensors` sorts them: a pair that lies deeper has a path that ends in `.base_layer`.
        targets: names of parameters: whole paths, or their ends.
        rank_of: path of a stacked weight → rank of each expert's pair.
    Returns:
        What is wrong: pairs of which it cannot be told whose they are, ranks that do not divide a pair.
    """
    findings: list[str] = []
    wanted = list(targets)
    owners: dict[str, list[str]] = {}
    for path, leaves in held.weights.items():
        if leaves.keys() & {"A", "B"}:
            owners.setdefault(_NESTED.sub("", path), []).append(path)
    for owner, levels in owners.items():
        names = {name.rpartition(".")[2]: None for name in wanted if ends(f"{owner}.{name.rpartition('.')[2]}", name)}
        nested = any(path.endswith(_DEEPER) for path in levels)
        if not (names or nested):
            continue
        plain = list(names) == ["weight"] and levels == [owner]
        if plain and _fits(held.weights[owner], rank_of(f"{owner}.weight"), experts=1):
            continue  # the weight of an ordinary layer: a plain pair
        findings += _unfold_one(held, owner, sorted(levels, key=len, reverse=True), list(names), rank_of)
    return findings


def _unfold_one(
    held: Sorted, owner: str, levels: list[str], names: list[str], rank_of: Callable[[str], int]
) -> list[str]:
    """Place the pairs of one module, the innermost of which comes first."""
    if len(names) != len(levels) or (len(names) > 1 and not set(names) <= set(ORDER)):
        known = "" if len(names) < 2 else f" (of several in one module, only {', '.join(ORDER)} are known)"
        return [
            f"{owner} has {len(levels)} pairs on parameters, and target_parameters name {', '.join(names) or 'none'} "
            f"there, so it cannot be told whose they are; list exactly those that the file has a pair for{known}"
        ]
    findings = []
    for level, name in zip(levels, sorted(names, key=_position), strict=True):
        path = f"{owner}.{name}"
        leaves = held.weights.pop(level)
        rank = rank_of(path)
        if not _fits(leaves, rank):
            shapes = ", ".join(f"{leaf} {list(tensor.shape)}" for leaf, tensor in leaves.items())
            findings.append(f"{path} has {shapes}, which is not made of pairs of rank {rank}, one for each expert")
            continue
        held.weights[path] = {**leaves, "B": _by_expert(leaves["B"], rank)}
        held.kinds[path] = EXPERTS
    return findings


def fold_experts(weights: Mapping[str, Mapping[str, Tensor]], kinds: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Return the weights with experts' pairs under the paths and in the form that files have.

    Raises:
        AdapterError: two pairs in one module whose order is not known.
    """
    stacked = [path for path in weights if kinds.get(path) == EXPERTS]
    depth = _depths(stacked)
    found: dict[str, dict[str, Tensor]] = {}
    for path, leaves in weights.items():
        if path not in depth:
            found[path] = dict(leaves)
            continue
        B = leaves["B"]
        at = path.rpartition(".")[0] + _DEEPER * depth[path]
        found[at] = {**leaves, "B": _by_rank(B, leaves["A"].shape[0] // B.shape[1])}
    return found


def order_problems(paths: Iterable[str], model_order: Iterable[str]) -> dict[str, str]:
    """Return experts module → what is wrong, where it has its weights in another order than files assume.

    Args:
        paths: stacked weights that have a pair.
        model_order: all stacked weights of the model.
    """
    given = set(paths)
    by_owner: dict[str, list[str]] = {}
    for path in model_order:
        if path in given:
            owner, _, name = path.rpartition(".")
            by_owner.setdefault(owner, []).append(name)
    return {
        owner: f"has its weights in the order {', '.join(names)}; files of adapters assume {', '.join(ORDER)}"
        for owner, names in by_owner.items()
        if len(names) > 1 and names != sorted(names, key=_position)
    }


def _depths(stacked: Iterable[str]) -> dict[str, int]:
    by_owner: dict[str, list[str]] = {}
    for path in stacked:
        owner, _, name = path.rpartition(".")
        by_owner.setdefault(owner, []).append(name)
    unknown = {owner: names for owner, names in by_owner.items() if len(names) > 1 and not set(names) <= set(ORDER)}
    if unknown:
        owner, names = next(iter(unknown.items()))
        raise AdapterError(
            f"{owner} has pairs on {', '.join(names)}, and PEFT's files tell several pairs of a module apart by the "
            f"order of its parameters alone, which is known for {', '.join(ORDER)}. Adapt one of them."
        )
    return {
        f"{owner}.{name}" if owner else name: depth
        for owner, names in by_owner.items()
        for depth, name in enumerate(sorted(names, key=_position, reverse=True))
    }


def _position(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _fits(leaves: Mapping[str, Tensor], rank: int, experts: int | None = None) -> bool:
    A, B = leaves.get("A"), leaves.get("B")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return False
    return A.shape[0] % rank == 0 and (experts is None or A.shape[0] == experts * rank)


def _by_expert(B: Tensor, rank: int) -> Tensor:
    """[out, rank * experts], the expert fastest → [experts * out, rank]."""
    return B.reshape(B.shape[0], rank, -1).permute(2, 0, 1).reshape(-1, rank).contiguous()


def _by_rank(B: Tensor, experts: int) -> Tensor:
    """[experts * out, rank] → [out, rank * experts], the expert fastest."""
    return B.reshape(experts, -1, B.shape[1]).permute(1, 2, 0).reshape(B.shape[0] // experts, -1).contiguous()
