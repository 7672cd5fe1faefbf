"""PEFT's adapter_config.json to an `AdapterConfig` and back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from sideroad.config import AdapterConfig
from sideroad.patterns import matches
from sideroad.peft_fields import BIASES, init_of, shown, sift
from sideroad.peft_keys import EXPERTS, OUTPUT, Sorted
from sideroad.peft_parts import (
    file_rank,
    file_ranks,
    follows_embedding,
    module_findings,
    our_modules,
    our_tokens,
    output_patterns,
    peft_path,
    said_rank,
    saved_names,
    their_modules,
    their_tokens,
    unfold_slices,
)
from sideroad.peft_targets import (
    bare_suffix,
    ends,
    is_target,
    names_in,
    our_patterns,
    our_targets,
    plain_number,
    their_parameters,
    their_patterns,
    their_targets,
    their_value,
)
from sideroad.targets import alpha_of

__all__ = [
    "Reading", "file_rank", "file_ranks", "read_config", "said_rank", "saved_names", "unfold_slices", "write_config",
]  # fmt: skip



@dataclass(frozen=True)
class Reading:
    """What an adapter_config.json says, in our words."""

    config: AdapterConfig = field(default_factory=AdapterConfig)
    task_type: str | None = None
    base_name: str | None = None
    foreign: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    """Everything that forbids using it; the configuration is then a default one."""


def read_config(
    fields: Mapping[str, Any],
    ranks: Mapping[str, int],
    held: Sorted | None = None,
    *,
    stored_float32: bool = True,
    allow_unknown: tuple[str, ...] = (),
    source: str = "adapter_config.json",
) -> Reading:
    """Map the fields of an adapter_config.json of any PEFT version.

    Args:
        fields: the file's object.
        ranks: module path → rank of its tensors; patterns are checked against them.
        held: the tensors themselves, sorted; none where only pairs of the plain kind are there.
        stored_float32: the tensors are stored in float32.
        allow_unknown: unknown fields to keep although they are set.
        source: named in the findings.
    """
    held = held or Sorted()
    kept, findings = sift(fields, allow_unknown, source=source)
    init, trouble = init_of(fields, kept, source)
    numbers = _Numbers(fields, source)
    rank = numbers.whole("r", 8)
    alpha = numbers.real("lora_alpha", 8, above=True)
    dropout = numbers.real("lora_dropout", 0.0)
    rank_pattern, alpha_pattern = numbers.patterns("rank_pattern"), numbers.patterns("alpha_pattern")
    bias = fields.get("bias", "none") or "none"
    if not isinstance(bias, str) or bias not in BIASES:
        numbers.findings.append(f"{source}: bias is {shown(bias)}; allowed: none, lora_only, all")
    task, base = (fields.get(name) for name in ("task_type", "base_model_name_or_path"))
    numbers.findings += [
        f"{source}: {name} is {shown(value)}; expected a string or null"
        for name, value in (("task_type", task), ("base_model_name_or_path", base))
        if not isinstance(value, str | None)
    ]
    tokens, wrong_tokens = our_tokens(fields, held, source)
    findings += [*trouble, *numbers.findings, *_target_findings(fields, source), *wrong_tokens]
    findings += [*module_findings(fields, held, source), *_magnitude_findings(fields, ranks, held, source)]
    if not findings:
        findings += _fit_findings(fields, ranks, rank, rank_pattern, source, held)
    if findings:
        return Reading(findings=tuple(findings))
    try:
        config = AdapterConfig.model_validate({
            **our_targets(fields, list(ranks), held.kinds, exact=any(bare_suffix(fields, path) for path in ranks)),
            "modules_to_save": our_modules(fields, held),
            "trainable_tokens": tokens,
            "tie_embeddings": bool(fields.get("ensure_weight_tying")),
            "method": {
                "kind": "dora" if fields.get("use_dora") else "lora",
                "rank": rank, "alpha": alpha, "dropout": dropout, "init": init,
                "scaling": "alpha/sqrt(r)" if fields.get("use_rslora") else "alpha/r",
            },
            "rank_pattern": output_patterns(rank_pattern, rank, ranks, held.kinds)
            | our_patterns(rank_pattern, list(ranks)),
            "alpha_pattern": output_patterns(alpha_pattern, alpha, ranks, held.kinds)
            | our_patterns(alpha_pattern, list(ranks)),
            "bias": BIASES[bias],
            "dtype": "float32" if stored_float32 else "base",
        })  # fmt: skip
    except ValidationError as error:
        wrong = tuple(f"{source}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return Reading(findings=wrong)
    return Reading(config, task, base, kept)


def write_config(
    config: AdapterConfig,
    ranks: Mapping[str, int],
    held: Sorted | None = None,
    *,
    task_type: str | None,
    base_name: str | None,
    foreign: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the smallest adapter_config.json that PEFT reads as exactly this adapter.

    Args:
        ranks: module path → rank of its tensors. `r` and `rank_pattern` come from them, whatever `config` says.
        held: the tensors themselves, sorted; none where only pairs of the plain kind are there.
    """
    held = held or Sorted()
    # PEFT has one entry for an attention with its output projection
    alphas = {peft_path(path, held.kinds): alpha_of(config, path) for path in ranks}
    ranks = {peft_path(path, held.kinds): value for path, value in ranks.items()}
    stacked = [path for path in ranks if held.kinds.get(path) == EXPERTS]
    paths = [path for path in ranks if path not in stacked]
    rank = config.method.rank
    if ranks and not any(value == rank for value in ranks.values()):
        rank = Counter(ranks.values()).most_common(1)[0][0]
    method = config.method
    fields: dict[str, Any] = {
        "r": rank,
        "lora_alpha": plain_number(method.alpha),
        "lora_dropout": method.dropout,
        "ensure_weight_tying": config.tie_embeddings,
        "use_rslora": method.scaling == "alpha/sqrt(r)",
        "use_dora": method.kind == "dora",
        "bias": next(theirs for theirs, ours in BIASES.items() if ours == config.bias),
        "rank_pattern": their_patterns(config.rank_pattern, ranks, rank),
        "alpha_pattern": their_patterns(config.alpha_pattern, alphas, method.alpha),
        "init_lora_weights": "gaussian" if method.init == "gaussian" else None,
        "modules_to_save": their_modules(held),
        "trainable_token_indices": their_tokens(config, held),
        **their_targets(_without(config, paths, stacked), paths, exact=OUTPUT in held.kinds.values()),
        "target_parameters": their_parameters(
            config.targets, stacked, limited=bool(config.exclude) or config.layers is not None
        ),
    }
    always = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_name, "inference_mode": True,
        "r": rank, "lora_alpha": fields["lora_alpha"], "target_modules": fields["target_modules"],
    }  # fmt: skip
    defaults: tuple[Any, ...] = (None, False, 0.0, "none", {}, [])
    return {**foreign, **{k: v for k, v in fields.items() if v not in defaults}, **always}


def _target_findings(fields: Mapping[str, Any], source: str) -> list[str]:
    findings = []
    parameters = fields.get("target_parameters")
    if not (parameters is None or _all(parameters, str)):
        findings.append(f"{source}: target_parameters is {shown(parameters)}; expected a list of names or null")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        if not (value is None or isinstance(value, str) or _all(value, str)):
            findings.append(f"{source}: {name} is {shown(value)}; expected a list of names, a string or null")
        elif name != "layers_pattern" and isinstance(value, str):
            findings += _regex_finding(value, f"{source}: {name}")
        elif name == "layers_pattern":
            for item in [value] if isinstance(value, str) else value or []:
                findings += _regex_finding(item, f"{source}: {name}")
    layers = fields.get("layers_to_transform")
    if not (layers is None or type(layers) is int or _all(layers, int)):
        findings.append(f"{source}: layers_to_transform is {shown(layers)}; expected a list of whole numbers or null")
    return findings


def _magnitude_findings(
    fields: Mapping[str, Any], ranks: Mapping[str, int], held: Sorted, source: str
) -> list[str]:
    """DoRA is said in the configuration and held in the file, or neither."""
    said = fields.get("use_dora", False) or False
    if not isinstance(said, bool):
        return [f"{source}: use_dora is {shown(said)}; expected true or false"]
    wrong = [path for path in ranks if ("magnitude" in held.weights.get(path, {})) != said]
    if not wrong:
        return []
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    what = "no DoRA magnitude, but use_dora is true" if said else "a DoRA magnitude, but use_dora is not true"
    return [f"{wrong[0]}{more}: there is {what} in {source}; without both, what the adapter computes is not known"]


def _fit_findings(
    fields: Mapping[str, Any], ranks: Mapping[str, int], rank: int, pattern: Mapping[str, int], source: str,
    held: Sorted,
) -> list[str]:  # fmt: skip
    findings = []
    for path, found in ranks.items():
        said = their_value(pattern, peft_path(path, held.kinds), rank)
        if said != found:
            findings.append(
                f"{path}: its tensors have rank {found} but {source} says {said} (r, rank_pattern); the scale would be "
                "wrong. Correct the configuration or fetch the matching pair of files"
            )
    strays = [
        path
        for path in ranks
        if not is_target(fields, peft_path(path, held.kinds))
        and held.kinds.get(path) != EXPERTS
        and not any(ends(f"{path}.weight", name) for name in names_in(fields))
        and not (fields.get("ensure_weight_tying") and follows_embedding(path, held.weights))
        and not bare_suffix(fields, path)
    ]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        findings.append(
            f"{source}: target_modules {shown(fields.get('target_modules'), 400)}, with exclude_modules and "
            f"layers_to_transform, do not cover modules that have tensors: {', '.join(strays[:3])}{more}. PEFT would "
            "skip them silently; add them to target_modules or remove their tensors"
        )
    return findings


def _without(config: AdapterConfig, paths: list[str], stacked: list[str]) -> AdapterConfig:
    """The configuration without the targets that mean stacked weights alone, which PEFT names in another field."""
    if not stacked or isinstance(config.targets, str):
        return config
    kept = tuple(one for one in config.targets if any(matches(one, path) for path in paths) or one == "all-linear")
    return config.model_copy(update={"targets": kept})


class _Numbers:
    """Reads numbers out of a configuration and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields, self.source, self.findings = fields, source, list[str]()

    def whole(self, name: str, default: int) -> int:
        value = self.fields.get(name, default)
        return int(value) if self._check(name, value, whole=True, above=True) else default

    def real(self, name: str, default: float, *, above: bool = False) -> float:
        value = self.fields.get(name, default)
        return float(value) if self._check(name, value, whole=False, above=above) else default

    def patterns(self, name: str) -> dict[str, Any]:
        found = self.fields.get(name) or {}
        if not isinstance(found, dict):
            self.findings.append(f"{self.source}: {name} is {shown(found)}; expected a mapping of names to numbers")
            return {}
        for key, value in found.items():
            self._check(f"{name}[{key!r}]", value, whole=name == "rank_pattern", above=True)
            self.findings += _regex_finding(key, f"{self.source}: {name}")
        return dict(found)

    def _check(self, name: str, value: Any, *, whole: bool, above: bool) -> bool:
        right = type(value) is int or (not whole and type(value) is float and math.isfinite(value))
        right = right and value < 1e308 and (value >= 1 if whole else value > 0 if above else 0 <= value < 1)
        if not right:
            need = "a whole number of at least 1" if whole else "a number above 0" if above else "0 or more, below 1"
            self.findings.append(f"{self.source}: {name} is {shown(value)}; expected {need}")
        return right


def _regex_finding(pattern: str, where: str) -> list[str]:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{where}: {shown(pattern)} is not a valid regular expression ({str(error)[:200]})"]
    return []


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
