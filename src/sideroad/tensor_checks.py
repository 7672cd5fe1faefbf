"""What is wrong with an adapter's tensors by themselves, before any model is asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from sideroad.config import AdapterConfig
from sideroad.peft_keys import BASE, EXPERTS, module_key, path_order

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that an adapter's tensors may have."""

_DIMENSIONS: Mapping[str, tuple[int, ...]] = {
    "A": (2, 3, 4, 5), "B": (2, 3, 4, 5), "magnitude": (1,), "bias": (1,), "rows": (2,), BASE: (2,),
}  # fmt: skip
"""Leaf → how many dimensions it may have; more than 2 belong to convolutions."""


def weight_findings(
    weights: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, str] | None = None,
    experts: Collection[str] = (),
) -> list[str]:
    """List what is wrong with an adapter's tensors: halves missing, shapes, types, values that are not finite.

    Args:
        kinds: path → kind as a file has it: the findings then name tensors as files do; None: as an `Adapter` does.
        experts: paths of stacked weights, where `kinds` does not say it.
    """
    stacked = {*experts, *(path for path, kind in (kinds or {}).items() if kind == EXPERTS)}

    def name(path: str, leaf: str) -> str:
        if kinds is None:
            return f"{path}.{leaf}"
        return module_key(path, leaf, adapted="A" in weights[path], kind=kinds.get(path))

    findings = []
    if not modules and not any(leaves.keys() & {"A", "B", "rows"} for leaves in weights.values()):
        findings.append("there is no pair of lora_A and lora_B at all; an adapter needs at least one")
    for path in sorted(weights, key=path_order):
        leaves = weights[path]
        unknown = sorted(leaves.keys() - _DIMENSIONS.keys())
        findings += [f"{path} has a tensor {leaf!r}; known: A, B, magnitude, bias, rows" for leaf in unknown]
        for leaf, other in (("A", "B"), ("B", "A")):
            if leaf in leaves and other not in leaves:
                findings.append(f"{name(path, leaf)} has no partner {name(path, other)}")
        bad = [
            finding
            for leaf in leaves
            if leaf in _DIMENSIONS
            for finding in _tensor_findings(name(path, leaf), leaves[leaf], _DIMENSIONS[leaf])
        ]
        named = {leaf: (name(path, leaf), leaves[leaf]) for leaf in leaves}
        findings += bad or _shape_findings(named, grouped=path in stacked)
    for path, state in modules.items():
        for part, tensor in state.items():
            if tensor.is_floating_point():
                findings += _tensor_findings(f"{path}.{part}", tensor, range(9))
    return findings


def bias_findings(config: AdapterConfig, weights: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """List biases that an adapter holds though its configuration trains none there."""
    biased = [path for path, leaves in weights.items() if "bias" in leaves]
    stray = [
        path for path in biased if config.bias == "none" or (config.bias == "adapted" and "A" not in weights[path])
    ]
    if not stray:
        return []
    more = f" and {len(stray) - 3} more" if len(stray) > 3 else ""
    return [
        f"there is a bias for {', '.join(stray[:3])}{more}, but the configuration trains {config.bias!r} biases "
        "(PEFT's bias: none, lora_only, all); set it to what the file holds"
    ]


def _tensor_findings(name: str, tensor: Tensor, dimensions: tuple[int, ...] | range) -> Iterator[str]:
    if tensor.ndim not in dimensions:
        yield f"{name} has shape {list(tensor.shape)}; expected {dimensions[0]} dimensions"
    elif not tensor.numel():
        yield f"{name} is empty (shape {list(tensor.shape)}); it was probably saved from a sharded model"
    elif tensor.dtype not in FLOATS:
        yield f"{name} has type {tensor.dtype}; allowed: {', '.join(str(t).removeprefix('torch.') for t in FLOATS)}"
    elif not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        yield f"{name} has {bad} of {tensor.numel()} values that are NaN or infinite; go back to an earlier checkpoint"


def _shape_findings(named: Mapping[str, tuple[str, Tensor]], *, grouped: bool) -> list[str]:
    if "A" not in named or "B" not in named:
        return []
    (name_a, A), (name_b, B) = named["A"], named["B"]
    findings = []
    # a convolution in groups has several pairs, as experts have, so A has a multiple of B's rank
    fits = A.shape[0] == B.shape[1] or ((A.ndim > 2 or grouped) and A.shape[0] % B.shape[1] == 0)
    if not fits or A.ndim != B.ndim:
        findings.append(
            f"{name_a} {list(A.shape)} and {name_b} {list(B.shape)} have ranks {A.shape[0]} and "
            f"{B.shape[1]}; expected [rank, in] and [out, rank]"
        )
    for leaf in ("bias", "magnitude"):
        if leaf in named and named[leaf][1].shape[0] != B.shape[0]:
            findings.append(
                f"{named[leaf][0]} has {named[leaf][1].shape[0]} values; the layer has {B.shape[0]} outputs"
            )
    return findings
