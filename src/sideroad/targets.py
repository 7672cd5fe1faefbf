"""Targets to module paths: one pattern language, and errors that name the near miss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from sideroad.config import SUBTRACTED, AdapterConfig, init_name
from sideroad.errors import AdapterError, TargetError, did_you_mean, raise_findings
from sideroad.kinds.experts import ExpertWeight
from sideroad.pairs import blocks, pair_shapes, slices_of
from sideroad.patterns import first_match, is_name, matches, shortest_names
from sideroad.peft_parts import attention_findings
from sideroad.survey import Survey
from sideroad.weights import has_trainable_bias, layer_shape

__all__ = [
    "Counts",
    "Survey",
    "Target",
    "alpha_of",
    "bias_paths",
    "count_values",
    "matches",
    "named_exactly",
    "rank_of",
    "resolve",
    "select",
    "shortest_names",
]


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its module path, its (out, in) features, the rank and alpha it gets, and how many pairs."""

    path: str
    out_features: int
    in_features: int
    rank: int
    alpha: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of A and B, as they are stored and saved."""
    largest_rank: int
    """The rank at which a pair can hold any change."""
    experts: int | None = None
    """How many experts' weights of (out, in) are stacked in it, each with a pair of its own; None for other layers."""

    @property
    def parameters(self) -> int:
        """Number of values in A and B."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Counts:
    """How many values a layer has: trained, in the file, and of the latter in float32 whatever the rest is."""

    trained: int
    stored: int
    wide: int = 0


def count_values(target: Target, config: AdapterConfig) -> Counts:
    """Count what a method trains on a layer, and what it leaves in the file, a trained bias apart.

    Ranks are taken as the target has them. AdaLoRA's file holds the share of its triplets that is kept on average; what
    each layer keeps, and what EVA gives it, only the data can say.
    """
    method, rows = config.method, target.shapes[0][0]
    A, B = map(math.prod, target.shapes)
    stored = A + (B if slices_of(config, target.path) is None else target.out_features * rows)
    if init_name(method.init) in SUBTRACTED:
        stored *= 2
    if method.kind == "dora":
        return Counts(A + B + target.out_features, stored + target.out_features, wide=target.out_features)
    if method.kind == "adalora":
        return Counts(A + B + rows, round(stored * method.target_rank / method.rank))
    return Counts(B if method.trains == "B" else A + B, stored)


def rank_of(config: AdapterConfig, path: str) -> int:
    """Return the rank for one path: the first matching `rank_pattern`, else the method's."""
    return first_match(config.rank_pattern, path, config.method.rank)


def alpha_of(config: AdapterConfig, path: str) -> float:
    """Return alpha for one path: the first matching `alpha_pattern`, else the method's."""
    return first_match(config.alpha_pattern, path, config.method.alpha)


def resolve(model: nn.Module | Survey, config: AdapterConfig, *, any_rank: bool = False) -> dict[str, Target]:
    """Find the layers that a configuration adapts, by module path, in the model's order. Works on meta models.

    A module that hangs in the model under several paths is listed once, under its first.

    Args:
        model: or what was read of it already.
        any_rank: let ranks be larger than a layer, which costs memory and gives nothing.
    Raises:
        TargetError: everything wrong at once: patterns that match nothing, named modules that cannot be adapted,
            blocks that do not exist, ranks larger than a layer, no bias where biases are to be trained.
    """
    survey = model if isinstance(model, Survey) else Survey(model)
    findings = _broken(config)
    raise_findings(TargetError, f"targets of {survey.model_name}", findings)
    chosen = survey.select(config, findings)
    misfits = _check_slices(survey, config, chosen)
    if misfits:
        raise_findings(TargetError, f"targets of {survey.model_name}", findings + misfits)
    targets = {path: _target(config, path, survey.adaptable[path]) for path in chosen}
    whole, rows = survey.whole(config, findings), survey.rows(config, findings)
    if not targets and not findings and not (whole or rows):
        findings.append(f"no layer of {survey.model_name} is left to adapt after exclude and layers. {survey.found()}")
    if targets:
        findings += _check_numbers(survey, config, targets)
        findings += [] if any_rank else oversized(survey, targets)
        findings += _too_narrow(survey, config, targets, any_rank=any_rank)
    if targets or whole or rows:
        findings += _check_biases(survey, config, targets)
    raise_findings(TargetError, f"targets of {survey.model_name}", findings)
    return targets


def select(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Return the paths that a configuration means, without complaint about patterns that mean nothing."""
    return tuple(Survey(model).select(config, []))


def bias_paths(model: nn.Module, config: AdapterConfig, targets: Iterable[str]) -> tuple[str, ...]:
    """Return the modules whose bias is trained: none, those of `targets` that have one, or all but the excluded."""
    return Survey(model).biases(config, targets)


def named_exactly(survey: Survey, config: AdapterConfig, targets: Collection[str]) -> AdapterConfig:
    """Return the configuration with its layers given by the shortest names that mean exactly `targets`.

    Args:
        targets: canonical module paths; none leaves the configuration as it is.
    """
    if not targets:
        return config
    others = [path for path in survey.modules if path and survey.canonical[path] not in targets]
    changes = {"targets": shortest_names(targets, others), "layers": None, "layers_pattern": None}
    # exclude still decides which biases "all" means
    return config.model_copy(update=changes if config.bias == "all" else {**changes, "exclude": ()})


def _broken(config: AdapterConfig) -> list[str]:
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    findings = []
    for pattern in (*targets, *config.exclude, *config.rank_pattern, *config.alpha_pattern):
        try:
            matches(pattern, "")
        except TargetError as error:
            findings.append(str(error))
    return findings


def _target(config: AdapterConfig, path: str, layer: nn.Module) -> Target:
    out_features, in_features = layer_shape(layer)
    parts, rank = slices_of(config, path), rank_of(config, path)
    A, B = pair_shapes(config, path, layer, rank)
    narrowest = out_features // (A[0] // rank)
    if parts is not None:
        narrowest = min(stop - start for start, stop in blocks(parts, out_features))
    experts = layer.count if isinstance(layer, ExpertWeight) else None
    out_features = narrowest if experts else out_features
    largest = min(narrowest, in_features)
    return Target(path, out_features, in_features, rank, alpha_of(config, path), (A, B), largest, experts)


def _check_slices(survey: Survey, config: AdapterConfig, chosen: Iterable[str]) -> list[str]:
    """Findings about slices: patterns that no target uses, layers that are not linear, parts that do not add up."""
    findings: list[str] = []
    for pattern in config.slices:
        if not any(matches(pattern, path) for path in chosen) and not config.allow_unmatched:
            findings.append(f'slices "{pattern}" matches none of the adapted layers of {survey.model_name}.')
    for path in chosen:
        parts = slices_of(config, path)
        if parts is not None and not survey.kinds[path].linear:
            findings.append(f"slices are given for {path}, which is no linear layer; only fused linear layers have.")
        elif parts is not None:
            try:
                blocks(parts, layer_shape(survey.adaptable[path])[0])
            except AdapterError as error:
                findings.append(f"{path}: {error}")
    return findings


def _check_numbers(survey: Survey, config: AdapterConfig, targets: Mapping[str, Target]) -> list[str]:
    """Findings about patterns that no target uses, and about attentions whose projections differ."""
    findings: list[str] = []
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not config.allow_unmatched and not any(matches(pattern, path) for path in targets):
                leaves = sorted({path.rpartition(".")[2] for path in targets})
                guess = did_you_mean(pattern, leaves) if is_name(pattern) else ""
                findings.append(
                    f'{field} "{pattern}" matches none of the adapted layers of {survey.model_name}.\n'
                    f"  Adapted: {', '.join(leaves) or 'none'}.\n {guess}".rstrip()
                )
    kinds = {path: survey.kinds[path].name for path in targets}
    ranks, alphas = ({path: getattr(one, what) for path, one in targets.items()} for what in ("rank", "alpha"))
    findings += [f"{finding}." for finding in attention_findings(ranks, alphas, kinds)]
    return findings


def oversized(survey: Survey, targets: Mapping[str, Target]) -> list[str]:
    """Return a finding for each kind of layer that gets a larger rank than it can have."""
    findings: list[str] = []
    large = [target for target in targets.values() if target.rank > target.largest_rank]
    groups = Counter(
        (target.path.rpartition(".")[2], target.rank, target.out_features, target.in_features, target.largest_rank)
        for target in large
    )
    for (leaf, rank, out_features, in_features, largest), count in groups.items():
        findings.append(
            f"rank {rank} is larger than {leaf} ({count} layer{'s' * (count > 1)} of {survey.model_name}, "
            f"[out, in] = [{out_features}, {in_features}]); the largest rank there is {largest}."
            " Lower method.rank, or set rank_pattern for it."
        )
    return findings


def _too_narrow(
    survey: Survey, config: AdapterConfig, targets: Mapping[str, Target], *, any_rank: bool
) -> list[str]:
    """A finding for each kind of layer that has too few directions for LoRA-GA, and is not refused as too small."""
    if init_name(config.method.init) != "lora-ga":
        return []
    narrow = Counter(
        (target.path.rpartition(".")[2], target.rank, target.out_features, target.in_features)
        for target in targets.values()
        if target.largest_rank < 2 * target.rank and (any_rank or target.rank <= target.largest_rank)
    )
    return [
        f"{leaf} ({count} layer{'s' * (count > 1)} of {survey.model_name}, [out, in] = [{out_features}, "
        f"{in_features}]): init: lora-ga takes 2 x rank directions, so its rank can be "
        f"{min(out_features, in_features) // 2} at most, found {rank}. Lower method.rank, or set rank_pattern for it."
        for (leaf, rank, out_features, in_features), count in narrow.items()
    ]


def _check_biases(survey: Survey, config: AdapterConfig, targets: Iterable[str]) -> list[str]:
    if config.bias == "none":
        return []
    if not survey.biases(config, targets):
        where = "no adapted layer" if config.bias == "adapted" else "no layer"
        return [f'bias is "{config.bias}", but {where} of {survey.model_name} has a bias; set bias: none.']
    if config.bias == "adapted":
        return []
    left = survey.excluded(config, []) | survey.inside_whole(config)
    other = [
        f"{path} ({type(module).__name__})"
        for path, module in survey.modules.items()
        if module._parameters.get("bias") is not None and not has_trainable_bias(module) and path not in left
    ]
    if not other:
        return []
    return [
        f'bias is "all", but these biases cannot be trained: {", ".join(other)}; allowed: Linear, Conv1D, '
        "convolutions, LayerNorm, BatchNorm, GroupNorm. Exclude them, or set bias: adapted."
    ]
