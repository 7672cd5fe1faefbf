"""A model's modules, read once: which can be adapted, which are the output head, and what a configuration means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from sideroad.config import AdapterConfig
from sideroad.errors import did_you_mean
from sideroad.kinds import ALLOWED, Kind, keeps_its_promise, kind_of
from sideroad.kinds.attention import OutProjection
from sideroad.kinds.embedding import Embedding as EmbeddingKind
from sideroad.kinds.experts import Experts, ExpertWeight, expert_weights, routers
from sideroad.kinds.linear import Linear as LinearKind
from sideroad.patterns import block_index, is_name, matches, parse_blocks, ranges
from sideroad.route import walk
from sideroad.weights import has_trainable_bias

ALL_LINEAR = "all-linear"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that run over their children."""

HEADS = ("lm_head", "classifier", "score", "qa_outputs", "head")
"""Names of output layers, for models that do not say in their structure which one it is."""


class Survey:
    """A model's modules, read once: by path, the adaptable ones, and the output head.

    Args:
        model: may live on the meta device and may carry adapters, which are not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model_name = type(model).__name__
        self.modules: dict[str, nn.Module] = {}
        """Every path, aliases of shared modules included; behind an experts module a view of each stacked weight."""
        self.canonical: dict[str, str] = {}
        """Path → first path of the same module."""
        first: dict[int, str] = {}
        for path, module in walk(model):
            self.modules[path] = module
            self.canonical[path] = first.setdefault(id(module), path)
            for name in expert_weights(module):
                inner = f"{path}.{name}" if path else name
                self.modules[inner] = ExpertWeight(module, name)
                start = self.canonical[path]
                self.canonical[inner] = f"{start}.{name}" if start else name
        self.kinds: dict[str, Kind] = {
            path: kind
            for path, module in self.modules.items()
            if path and self.canonical[path] == path
            and (kind := kind_of(module)) is not None and keeps_its_promise(module)
        }
        """Canonical path of each layer that a pair can act on → its kind."""
        self.adaptable = {path: self.modules[path] for path in self.kinds}
        self.linear = {path: self.modules[path] for path, kind in self.kinds.items() if kind.linear}
        self.experts = {path: self.modules[path] for path, kind in self.kinds.items() if isinstance(kind, Experts)}
        self.routers = routers(self.modules)
        self.heads = _heads(model, self.linear)

    @property
    def called(self) -> dict[str, nn.Module]:
        """The paths of real modules, without the views of stacked weights."""
        return {path: module for path, module in self.modules.items() if not isinstance(module, ExpertWeight)}

    def select(self, config: AdapterConfig, findings: list[str]) -> list[str]:
        """Return the chosen canonical paths in model order; append what is wrong with the patterns to `findings`."""
        patterns = (config.targets,) if isinstance(config.targets, str) else config.targets
        chosen: set[str] = set()
        for pattern in patterns:
            if pattern == ALL_LINEAR:
                chosen |= (self.linear.keys() - self.heads - self.routers) | self.experts.keys()
                if not (self.linear or self.experts):
                    findings.append(f"{self.model_name} has no linear layer inside it that could be adapted.")
            else:
                chosen |= self._matched(pattern, findings, config.allow_unmatched)
        chosen -= self.excluded(config, findings)
        if config.tie_embeddings:
            chosen = {self.leader(path) for path in chosen}
        chosen -= self._inside_whole(config, chosen, findings)
        blocks = self._blocks(config, findings)
        if blocks is not None:
            chosen &= blocks
        return [path for path in self.adaptable if path in chosen]

    def whole(self, config: AdapterConfig, findings: list[str]) -> list[str]:
        """Return the paths of modules trained whole, outermost ones only, in model order; containers part by part."""
        chosen: list[str] = []
        for pattern in config.modules_to_save:
            hits = [path for path in self.modules if path and matches(pattern, path)]
            if not hits and not config.allow_unmatched:
                names = dict.fromkeys(path.rpartition(".")[2] for path in self.modules if path)
                guess = did_you_mean(pattern, names) if is_name(pattern) else ""
                findings.append(f'modules_to_save "{pattern}" matches no module of {self.model_name}.{guess}')
            empty = [path for path in hits if next(self.modules[path].parameters(), None) is None]
            findings += [f'modules_to_save "{pattern}" means {path}, which has no parameters.' for path in empty[:1]]
            parts = [part for path in hits if path not in empty for part in self.parts(path)]
            uncalled = [(part, why) for part in parts if (why := self.uncalled(part))]
            findings += [f'modules_to_save "{pattern}" means {path}, which {why}.' for path, why in uncalled[:1]]
            own = [self.canonical[path] for path in hits]
            chosen += [self.leader(path) for path in own] if config.tie_embeddings else own
        wanted = set(chosen)
        outermost = [path for path in self.modules if path in wanted and not _inside(path, wanted)]
        return list(dict.fromkeys(self.canonical[part] for path in outermost for part in self.parts(path)))

    def uncalled(self, path: str) -> str | None:
        """Return why a copy could not act in place of the module at a path: nothing calls it; None where it could."""
        module = self.modules[path]
        if isinstance(module, ExpertWeight):
            return "is a stacked weight of fused experts; name the module around it"
        if self.canonical[path] in self.kinds and self.kinds[self.canonical[path]].name == OutProjection.name:
            return "has a weight that its attention reads without calling it; name the attention"
        if type(module).forward is nn.Module.forward:
            return f"is a {type(module).__name__} without a forward; name the modules in it, or the one around it"
        return None

    def parts(self, path: str) -> list[str]:
        """Return the modules that stand for the one at a path when it is trained whole.

        A container is its children: it runs over whatever modules it has, so it cannot be given one more.
        """
        module = self.modules[path]
        if not isinstance(module, CONTAINERS):
            return [path] if next(module.parameters(), None) is not None else []
        # a module that is in the container twice is one module
        first = {id(child): name for name, child in reversed(module._modules.items()) if child is not None}
        return [part for name in reversed(first.values()) for part in self.parts(f"{path}.{name}")]

    def rows(self, config: AdapterConfig, findings: list[str]) -> dict[str, tuple[int, ...]]:
        """Return the paths of embeddings and heads of which rows are trained, with the token ids."""
        found: dict[str, tuple[int, ...]] = {}
        for pattern, ids in config.trainable_tokens.items():
            hits = [path for path in self.modules if path and matches(pattern, path)]
            good = {self.canonical[path] for path in hits} & _row_layers(self).keys()
            if not hits and config.allow_unmatched:
                continue
            # the ids are looked up by the first path
            by_alias = [path for path in hits if self.canonical[path] in good and self.canonical[path] not in hits]
            findings += [
                f'trainable_tokens "{pattern}" means {path}, which is {self.canonical[path]} by another path; name it.'
                for path in by_alias[:1]
            ]
            if not good:
                there = ", ".join(path for path, layer in _row_layers(self).items() if isinstance(layer, nn.Embedding))
                what = "matches no module" if not hits else f"means {type(self.modules[hits[0]]).__name__} ({hits[0]})"
                findings.append(
                    f'trainable_tokens "{pattern}" {what}; rows can be trained of embeddings ({there}) and heads.'
                )
            for path in good:
                count = _row_layers(self)[path].get_parameter("weight").shape[0]
                over = [one for one in ids if one >= count]
                if over:
                    findings.append(
                        f"trainable_tokens {over[:5]} are outside the {count} rows of {path}; call "
                        f"resize_token_embeddings({max(ids) + 1}) first if they are new."
                    )
                found.setdefault(path, ids)
        return {path: found[path] for path in self.modules if path in found}

    def _inside_whole(self, config: AdapterConfig, chosen: set[str], findings: list[str]) -> set[str]:
        """Chosen paths that are trained anyway, being in a module that is trained whole."""
        whole = self.inside_whole(config)
        inside = chosen & whole
        rows = set(self.rows(config, []))
        findings += [
            f"{path} is a target, and some of its rows are in trainable_tokens; train one or the other."
            for path in sorted(chosen & rows)
        ]
        findings += [
            f"{path} is in modules_to_save, and some of its rows are in trainable_tokens; train one or the other."
            for path in sorted(rows)
            if path in whole
        ]
        return inside

    def biases(self, config: AdapterConfig, targets: Iterable[str]) -> tuple[str, ...]:
        """Return the paths whose bias `config.bias` trains, in model order."""
        if config.bias == "none":
            return ()
        everywhere = self.modules.keys() - self.inside_whole(config)
        wanted = set(targets) if config.bias == "adapted" else everywhere - self.excluded(config, [])
        return tuple(
            path
            for path, module in self.modules.items()
            if path in wanted and self.canonical[path] == path and has_trainable_bias(module)
        )

    def kind_names(self, paths: Iterable[str]) -> dict[str, str]:
        """Return path → name of the kind, of those layers whose tensors have names of their own in files."""
        kinds = {path: self.kinds[path].name for path in paths if path in self.kinds}
        return {path: name for path, name in kinds.items() if name}

    def sharers(self, path: str) -> list[str]:
        """Return the other layers that hold the very weight of the layer at a path, in model order."""
        weight = self.modules[path]._parameters.get("weight")
        return [
            other
            for other, module in self.modules.items()
            if other != self.canonical[path]
            and self.canonical[other] == other
            and weight is not None
            and module._parameters.get("weight") is weight
        ]

    def leader(self, path: str) -> str:
        """Return the embedding whose weight the layer at a path holds; the path itself where there is none."""
        here = [path, *self.sharers(path)]
        return next((one for one in self.modules if one in here and isinstance(self.modules[one], nn.Embedding)), path)

    def inside_whole(self, config: AdapterConfig) -> set[str]:
        """Return the paths of modules trained whole and of all that is in them."""
        whole = set(self.whole(config, []))
        return {path for path in self.modules if path in whole or _inside(path, whole)}

    def leaves(self) -> list[str]:
        """Return the distinct last names of adaptable layers, in model order."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.adaptable))

    def found(self) -> str:
        """Return the sentence that lists the layers there are."""
        return f"Layers found: {', '.join(self.leaves()) or 'none'}."

    def _matched(self, pattern: str, findings: list[str], allow: bool) -> set[str]:
        """Canonical adaptable paths that one target pattern means; a name must mean nothing else."""
        hits = [path for path in self.modules if path and matches(pattern, path)]
        good = {self.canonical[path] for path in hits if self.canonical[path] in self.adaptable}
        wrong = [path for path in hits if self.canonical[path] not in self.adaptable]
        if not hits and not allow:
            findings.append(self._near_miss("target", pattern))
        elif wrong and (is_name(pattern) or not good):
            kinds = Counter(type(self.modules[path]).__name__ for path in wrong)
            shown = ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items())
            findings.append(
                f'target "{pattern}" means {shown} ({wrong[0]}{", …" if len(wrong) > 1 else ""}) in {self.model_name}, '
                f"which cannot be adapted; allowed: {ALLOWED}.\n  {self.found()}"
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
            elif not hits and not config.allow_unmatched:
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


def _inside(path: str, outer: Collection[str]) -> bool:
    """Whether a path lies below one of the others."""
    parts = path.split(".")
    return any(".".join(parts[:count]) in outer for count in range(1, len(parts)))


def _row_layers(survey: Survey) -> dict[str, nn.Module]:
    """Layers whose weight is [tokens, dim]: embeddings and linear layers."""
    kinds = (EmbeddingKind, LinearKind)
    return {path: survey.modules[path] for path, kind in survey.kinds.items() if type(kind) in kinds}


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
