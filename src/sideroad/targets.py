"""Targets to module paths: one pattern language, and errors that name the near miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from sideroad.config import AdapterConfig
from sideroad.errors import TargetError, did_you_mean, raise_findings
from sideroad.patterns import block_index, first_match, is_name, matches, parse_blocks, ranges, shortest_names
from sideroad.route import walk
from sideroad.weights import has_trainable_bias, is_adaptable, layer_shape

__all__ = [
    "Survey",
    "Target",
    "alpha_of",
    "bias_paths",
    "matches",
    "named_exactly",
    "rank_of",
    "resolve",
    "select",
    "shortest_names",
]

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "head")
"""Names of output layers, for models that do not say in their structure which one it is."""


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its module path, its (out, in) features, and the rank and alpha it gets."""

    path: str
    out_features: int
    in_features: int
    rank: int
    alpha: float


def rank_of(config: AdapterConfig, path: str) -> int:
    """Return the rank for one path: the first matching `rank_pattern`, else the method's."""
    return first_match(config.rank_pattern, path, config.method.rank)


def alpha_of(config: AdapterConfig, path: str) -> float:
    """Return alpha for one path: the first matching `alpha_pattern`, else the method's."""
    return first_match(config.alpha_pattern, path, config.method.alpha)


def resolve(model: nn.Module, config: AdapterConfig) -> dict[str, Target]:
    """Find the layers that a configuration adapts, by module path, in the model's order. Works on meta models.

    A module that hangs in the model under several paths is listed once, under its first.

    Raises:
        TargetError: everything wrong at once: patterns that match nothing, named modules that cannot be adapted,
            blocks that do not exist, ranks larger than a layer, no bias where biases are to be trained.
    """
    survey = Survey(model)
    findings = _broken(config)
    raise_findings(TargetError, f"targets of {survey.model_name}", findings)
    chosen = survey.select(config, findings)
    targets = {path: _target(config, path, survey.adaptable[path]) for path in chosen}
    if not targets and not findings:
        findings.append(f"no layer of {survey.model_name} is left to adapt after exclude and layers. {survey.found()}")
    if targets:
        findings += _check_numbers(survey, config, targets)
        findings += _check_biases(survey, config, targets)
    raise_findings(TargetError, f"targets of {survey.model_name}", findings)
    return targets


def select(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Return the paths that a configuration means, without complaint about patterns that mean nothing."""
    return tuple(Survey(model).select(config, []))


def bias_paths(model: nn.Module, config: AdapterConfig, targets: Iterable[str]) -> tuple[str, ...]:
    """Return the modules whose bias is trained: none, those of `targets` that have one, or all but the excluded."""
    return Survey(model).biases(config, targets)


def named_exactly(model: nn.Module, config: AdapterConfig, targets: Collection[str]) -> AdapterConfig:
    """Return the configuration with its layers given by the shortest names that mean exactly `targets`.

    Args:
        targets: canonical module paths; none leaves the configuration as it is.
    """
    if not targets:
        return config
    survey = Survey(model)
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
    return Target(path, out_features, in_features, rank_of(config, path), alpha_of(config, path))


class Survey:
    """A model's modules, read once: by path, the adaptable ones, and the output head.

    Args:
        model: may live on the meta device and may carry adapters, which are not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model_name = type(model).__name__
        self.modules: dict[str, nn.Module] = {}
        """Every path, aliases of shared modules included."""
        self.canonical: dict[str, str] = {}
        """Path → first path of the same module."""
        first: dict[int, str] = {}
        for path, module in walk(model):
            self.modules[path] = module
            self.canonical[path] = first.setdefault(id(module), path)
        self.adaptable = {
            path: module
            for path, module in self.modules.items()
            if path and self.canonical[path] == path and is_adaptable(module)
        }
        self.heads = _heads(model, self.adaptable)

    def select(self, config: AdapterConfig, findings: list[str]) -> list[str]:
        """Return the chosen canonical paths in model order; append what is wrong with the patterns to `findings`."""
        patterns = (config.targets,) if isinstance(config.targets, str) else config.targets
        chosen: set[str] = set()
        for pattern in patterns:
            if pattern == ALL_LINEAR:
                chosen |= self.adaptable.keys() - self.heads
                if not self.adaptable:
                    findings.append(f"{self.model_name} has no linear layer inside it that could be adapted.")
            else:
                chosen |= self._matched(pattern, findings)
        chosen -= self.excluded(config, findings)
        blocks = self._blocks(config, findings)
        if blocks is not None:
            chosen &= blocks
        return [path for path in self.adaptable if path in chosen]

    def biases(self, config: AdapterConfig, targets: Iterable[str]) -> tuple[str, ...]:
        """Return the paths whose bias `config.bias` trains, in model order."""
        if config.bias == "none":
            return ()
        wanted = set(targets) if config.bias == "adapted" else self.modules.keys() - self.excluded(config, [])
        return tuple(
            path
            for path, module in self.modules.items()
            if path in wanted and self.canonical[path] == path and has_trainable_bias(module)
        )

    def leaves(self) -> list[str]:
        """Return the distinct last names of adaptable layers, in model order."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.adaptable))

    def found(self) -> str:
        """Return the sentence that lists the layers there are."""
        return f"Layers found: {', '.join(self.leaves()) or 'none'}."

    def _matched(self, pattern: str, findings: list[str]) -> set[str]:
        """Canonical adaptable paths that one target pattern means; a name must mean nothing else."""
        hits = [path for path in self.modules if path and matches(pattern, path)]
        good = {self.canonical[path] for path in hits if self.canonical[path] in self.adaptable}
        wrong = [path for path in hits if self.canonical[path] not in self.adaptable]
        if not hits:
            findings.append(self._near_miss("target", pattern))
        elif wrong and (is_name(pattern) or not good):
            kinds = Counter(type(self.modules[path]).__name__ for path in wrong)
            shown = ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items())
            findings.append(
                f'target "{pattern}" means {shown} ({wrong[0]}{", …" if len(wrong) > 1 else ""}) in {self.model_name}, '
                f"which cannot be adapted; allowed: nn.Linear and Conv1D.\n  {self.found()}"
            )
        return good

    def excluded(self, config: AdapterConfig, findings: list[str]) -> set[str]:
        """Return the canonical paths that `exclude` means; append what is wrong with it to `findings`."""
        excluded: set[str] = set()
        for pattern in config.exclude:
            hits = {self.canonical[path] for path in self.modules if path and matches(pattern, path)}
            useful = hits & self.adaptable.keys()
            if config.bias == "all":
                useful |= {path for path in hits if "bias" in self.modules[path]._parameters}
            if hits and not useful:
                findings.append(
                    f'exclude "{pattern}" names no layer but {type(self.modules[min(hits)]).__name__} ({min(hits)}); '
                    f'a glob such as "*{pattern}.*" covers what is inside.'
                )
            elif not hits:
                findings.append(self._near_miss("exclude", pattern))
            excluded |= useful
        return excluded

    def _near_miss(self, what: str, pattern: str) -> str:
        guess = did_you_mean(pattern, self.leaves()) if is_name(pattern) else ""
        return f'{what} "{pattern}" matches no layer of {self.model_name}.\n  {self.found()}\n {guess}'.rstrip()

    def _blocks(self, config: AdapterConfig, findings: list[str]) -> set[str] | None:
        """Paths in the requested blocks; None where no blocks are requested."""
        if config.layers is None:
            if config.layers_pattern is not None:
                findings.append('layers_pattern is set without layers; give both, such as layers: "0-3".')
            return None
        index_of = {path: block_index(path, config.layers_pattern) for path in self.adaptable}
        present = sorted({index for index in index_of.values() if index is not None})
        if not present:
            where = f'a block list named "{config.layers_pattern}"' if config.layers_pattern else "a numbered list"
            findings.append(f"layers asks for blocks, but no layer of {self.model_name} is inside {where}.")
            return set()
        wanted = parse_blocks(config.layers, present[-1], findings)
        missing = sorted(wanted - set(present))
        if missing:
            findings.append(
                f"layers asks for {ranges(missing)}, but {self.model_name} has blocks {ranges(present)} only."
            )
        return {path for path, index in index_of.items() if index in wanted}


def _check_numbers(survey: Survey, config: AdapterConfig, targets: Mapping[str, Target]) -> list[str]:
    """Findings about patterns that no target uses, and about ranks larger than a layer."""
    findings: list[str] = []
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(pattern, path) for path in targets):
                leaves = sorted({path.rpartition(".")[2] for path in targets})
                guess = did_you_mean(pattern, leaves) if is_name(pattern) else ""
                findings.append(
                    f'{field} "{pattern}" matches none of the adapted layers of {survey.model_name}.\n'
                    f"  Adapted: {', '.join(leaves) or 'none'}.\n {guess}".rstrip()
                )
    large = [target for target in targets.values() if target.rank > min(target.out_features, target.in_features)]
    groups = Counter(
        (target.path.rpartition(".")[2], target.rank, target.out_features, target.in_features) for target in large
    )
    for (leaf, rank, out_features, in_features), count in groups.items():
        findings.append(
            f"rank {rank} is larger than {leaf} ({count} layer{'s' * (count > 1)} of {survey.model_name}, "
            f"[out, in] = [{out_features}, {in_features}]); the largest rank there is {min(out_features, in_features)}."
            " Lower method.rank, or set rank_pattern for it."
        )
    return findings


def _check_biases(survey: Survey, config: AdapterConfig, targets: Iterable[str]) -> list[str]:
    if config.bias == "none":
        return []
    if not survey.biases(config, targets):
        where = "no adapted layer" if config.bias == "adapted" else "no layer"
        return [f'bias is "{config.bias}", but {where} of {survey.model_name} has a bias; set bias: none.']
    if config.bias == "adapted":
        return []
    excluded = survey.excluded(config, [])
    other = [
        f"{path} ({type(module).__name__})"
        for path, module in survey.modules.items()
        if module._parameters.get("bias") is not None and not has_trainable_bias(module) and path not in excluded
    ]
    if not other:
        return []
    return [
        f'bias is "all", but these biases cannot be trained: {", ".join(other)}; allowed: Linear, Conv1D, LayerNorm. '
        "Exclude them, or set bias: adapted."
    ]


def _heads(model: nn.Module, adaptable: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the output head: what the model says it is, what stands beside its base model, else known names."""
    ask = getattr(model, "get_output_embeddings", None)
    output = ask() if callable(ask) else None
    heads = {path for path, layer in adaptable.items() if layer is output}
    inner = model._modules.get(str(getattr(model, "base_model_prefix", "") or ""))
    if inner is not None:
        inside = {id(module) for module in inner.modules()}
        return heads | {path for path, layer in adaptable.items() if id(layer) not in inside}
    return heads or {path for path in adaptable if path in HEADS}
