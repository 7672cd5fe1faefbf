"""Files of PEFT's AdaLoRA (`peft_type: ADALORA`) as the plain LoRA that they compute."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KIND = "ADALORA"
OFFSET = 1e-5
"""What PEFT adds to the rank at the start when it divides by it."""
_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
"""Fields that say how ranks were dealt while training."""
_LARGE = 10**9
"""No rank and no alpha is this large."""
_LEAVES = ("lora_A", "lora_B", "lora_E")


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an adapter_config.json of AdaLoRA as those of the LoRA adapter that it is; others unchanged.

    There, s is lora_alpha / (init_r + 1e-5) in every layer, however many ranks are left, and `rank_pattern` says
    which: here ranks and alphas are of those that are left. Layers without any are excluded. Values that are not as
    PEFT writes them are left for the reader of plain fields to refuse.
    """
    rank, alpha, kept = fields.get("init_r", 12), fields.get("lora_alpha", 8), fields.get("rank_pattern")
    numbers = type(rank) is int and 0 < rank < _LARGE and type(alpha) in (int, float) and abs(alpha) < _LARGE
    if fields.get("peft_type") != KIND or not numbers or not (kept is None or _is_pattern(kept)):
        return dict(fields)
    s = (alpha if alpha > 0 else rank) / (rank + OFFSET)
    counts = {key.removesuffix(".lora_E"): sum(flags) for key, flags in (kept or {}).items()}
    plain = {name: value for name, value in fields.items() if name not in _SCHEDULE}
    gone = [path for path, count in counts.items() if not count]
    return {
        **plain,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": s * rank,
        "rank_pattern": {re.escape(path): count for path, count in counts.items() if count},
        "alpha_pattern": {re.escape(path): s * count for path, count in counts.items() if count},
        "exclude_modules": _excluded(fields.get("exclude_modules"), gone),
    }


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an AdaLoRA file's tensors with every Λ multiplied into its A, under the names of LoRA.

    Pairs without any rank left are dropped; a pair that lacks a part keeps its names, which are then refused.
    """
    found = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf not in _LEAVES or any(f"{path}.{one}" not in tensors for one in _LEAVES):
            found[key] = tensor
            continue
        values = tensors[f"{path}.lora_E"]
        if leaf == "lora_E" or not values.numel():
            continue
        fits = leaf == "lora_A" and values.ndim == 2 and values.shape == (tensor.shape[0], 1)
        found[f"{key}.weight"] = tensor * values if fits else tensor
    return found


def _excluded(said: Any, gone: list[str]) -> Any:
    if not gone or not isinstance(said, str | list | None):
        return said
    if isinstance(said, str) and said:
        return "|".join([f"(?:{said})", *map(re.escape, gone)])
    return [*(said or []), *gone]


def _is_pattern(kept: Any) -> bool:
    return isinstance(kept, dict) and all(
        isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags) for flags in kept.values()
    )
