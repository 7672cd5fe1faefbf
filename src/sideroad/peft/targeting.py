"""A LoraConfig and a model to an AdapterConfig: PEFT's rules of matching, and errors where PEFT says nothing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sideroad.adapter import Adapter
from sideroad.attaching import attached
from sideroad.config import AdapterConfig, AdapterDtype
from sideroad.errors import ConfigError, TargetError, did_you_mean, raise_findings
from sideroad.patterns import shortest_names
from sideroad.peft.config import LoraConfig, plain
from sideroad.peft.default_targets import default_names
from sideroad.peft.kinds import TaskType
from sideroad.peft_fields import BIASES, HEADS, INITS
from sideroad.peft_parts import output_patterns
from sideroad.peft_targets import ends, is_target, our_name, our_patterns, our_targets
from sideroad.survey import Survey

NARROW = frozenset({torch.float16, torch.bfloat16})


def settle(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Return a copy of a configuration as it stands for one model: heads of its task added, targets that are chosen by
    the model ("all-linear", None) by their names, the base's name filled in.

    Raises:
        TargetError: no target is given and the model has no layers of known names.
    """
    config.check()
    changes: dict[str, Any] = {
        name: type(value)(value) for name, value in vars(config).items() if isinstance(value, list | dict | set)
    }
    heads = _heads(config, model)
    if heads:
        changes["modules_to_save"] = [*dict.fromkeys([*(config.modules_to_save or ()), *heads])]
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    survey = Survey(model)
    changes["modules_to_save"] = _whole_names(changes.get("modules_to_save"), survey)
    settled = replace(config, **changes)
    if settled.target_modules is None:
        settled.target_modules = set() if settled.target_parameters else _default(survey)
    elif _is_all_linear(settled.target_modules):
        linear = _all_linear(settled, model, survey)
        others = [path for path in survey.called if path and survey.canonical[path] not in linear]
        _warn_of_experts(settled, survey)
        names = shortest_names(linear, others)
        settled.target_modules = set(linear if any(name.startswith("re:") for name in names) else names)
    return settled


def adapter_config(config: LoraConfig, model: nn.Module, *, autocast: bool) -> AdapterConfig:
    """Translate a settled configuration for one model.

    Args:
        autocast: keep adapters of a 16-bit base in fp32.
    Raises:
        TargetError: names that match no module (unless `allow_unmatched`), modules that cannot be adapted, and what
            the core finds wrong with blocks, ranks and biases.
    """
    survey = Survey(model)
    fields = plain(vars(config))
    fields["exclude_modules"], fields["target_modules"] = _present(config, survey, fields)
    stacked = _stacked(config, survey)
    chosen = {*_with_outputs(chosen_paths(config, survey, fields, some=bool(stacked)), survey), *stacked}
    paths = [path for path in survey.adaptable if path in chosen]
    return _at(our_targets(fields, paths, survey.kind_names(paths)), config, paths, model, autocast)


def adapter_config_at(config: LoraConfig, model: nn.Module, paths: list[str], *, autocast: bool) -> AdapterConfig:
    """Translate a configuration for modules that are known already, whatever its targets say."""
    return _at(our_targets({"target_modules": paths}, paths), config, paths, model, autocast)


def chosen_paths(config: LoraConfig, survey: Survey, fields: Mapping[str, Any], *, some: bool = False) -> list[str]:
    """Return the paths that PEFT's rules choose, each module once, in the model's order.

    Args:
        some: something is adapted besides (`target_parameters`), so there may be none.
    Raises:
        TargetError: none are left, or some cannot be adapted.
    """
    whole = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in config.modules_to_save or ()]
    paths = [
        path
        for path in survey.called
        if path and survey.canonical[path] == path
        and fields["target_modules"] and is_target(dict(fields), path)
        and not any(one.match(path) for one in whole)
    ]  # fmt: skip
    wrong = [path for path in paths if path not in survey.adaptable]
    findings = [
        f"target_modules mean {path} ({type(survey.modules[path]).__name__}), which cannot be adapted. {survey.found()}"
        for path in wrong[:3]
    ]
    if len(wrong) > 3:
        findings.append(f"and {len(wrong) - 3} more that cannot be adapted")
    if not (paths or some):
        findings.append(
            f"target_modules {_shown(config.target_modules)} mean no module of {survey.model_name}, with what "
            f"exclude_modules, layers_to_transform and modules_to_save leave.{_listed(config)} {survey.found()}"
        )
    raise_findings(TargetError, f"target_modules for {survey.model_name}", findings)
    return paths


def _at(
    said: Mapping[str, Any], config: LoraConfig, paths: list[str], model: nn.Module, autocast: bool
) -> AdapterConfig:
    survey = Survey(model)
    kinds = survey.kind_names(paths)
    values = {
        **said,
        "method": {
            "kind": "dora" if config.use_dora else "lora",
            "rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout,
            "scaling": "alpha/sqrt(r)" if config.use_rslora else "alpha/r",
            "init": _init(config),
        },
        "rank_pattern": _patterns(config, "rank_pattern", config.r, paths, kinds),
        "alpha_pattern": _patterns(config, "alpha_pattern", config.lora_alpha, paths, kinds),
        "modules_to_save": [our_name(name) for name in config.modules_to_save or ()],
        "trainable_tokens": _tokens(config, model, survey),
        "allow_unmatched": config.allow_unmatched,
        "tie_embeddings": config.ensure_weight_tying,
        "bias": BIASES[config.bias],
        "dtype": _dtype((survey.modules[path] for path in paths if path in survey.modules), autocast),
    }  # fmt: skip
    result = AdapterConfig.model_validate(values)
    if set(survey.select(result, [])) != set(paths):
        exact = our_targets({"target_modules": paths}, paths)
        result = AdapterConfig.model_validate({**values, **exact, "layers": None, "layers_pattern": None})
    return result


def _init(config: LoraConfig) -> str:
    """Return how the tensors start; EVA's wait with B = 0 for initialize_lora_eva_weights, as in PEFT."""
    init = INITS[config.init_lora_weights]
    return "kaiming" if init == "eva" else init


def _present(config: LoraConfig, survey: Survey, fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return exclude_modules and target_modules, whose names must each match a module (or are passed over)."""
    findings, kept = [], []
    for name in ("exclude_modules", "target_modules"):
        value = fields[name]
        if not isinstance(value, list):
            kept.append(value)
            continue
        unmatched = [one for one in value if not any(ends(path, one) for path in survey.called if path)]
        kept.append([one for one in value if one not in unmatched])
        findings += [
            f'{name}: "{one}" matches no module of {survey.model_name}.'
            f"{did_you_mean(one, [*survey.leaves(), *survey.adaptable])} {survey.found()} "
            "Take it out, or set allow_unmatched=True"
            for one in unmatched
            if not config.allow_unmatched
        ]
    raise_findings(TargetError, f"names that match nothing in {survey.model_name}", findings)
    return kept[0], kept[1]


def _with_outputs(paths: list[str], survey: Survey) -> list[str]:
    """Add the output projection of every attention: PEFT adapts both under the attention's name."""
    outputs = {f"{path}.out_proj" for path in paths if isinstance(survey.modules[path], nn.MultiheadAttention)}
    return [path for path in survey.adaptable if path in {*paths, *outputs}]


def _tokens(config: LoraConfig, model: nn.Module, survey: Survey) -> dict[str, list[int]]:
    """Return pattern → token ids; a plain list is for the model's input embedding."""
    said = config.trainable_token_indices
    if not said:
        return {}
    if isinstance(said, Mapping):
        return {our_name(name): list(ids) for name, ids in said.items()}
    ask = getattr(model, "get_input_embeddings", None)
    embedding = ask() if callable(ask) else None
    path = next((path for path, module in survey.modules.items() if module is embedding), None)
    if embedding is None or path is None:
        raise TargetError(
            f"trainable_token_indices is a list, but {survey.model_name} does not say its input embedding; name it: "
            "{name: [ids]}."
        )
    return {our_name(path): list(said)}


def _patterns(
    config: LoraConfig, name: str, usual: float, paths: list[str], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Return a pattern field in our words; what it says of an attention holds for its output projection too."""
    used = _used(config, name, paths)
    return output_patterns(used, usual, paths, kinds) | our_patterns(used, paths)


def _used(config: LoraConfig, name: str, paths: list[str]) -> dict[str, Any]:
    """Return a pattern field, whose keys must each match an adapted module (or are passed over)."""
    pattern: dict[str, Any] = getattr(config, name) or {}
    unmatched = [key for key in pattern if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths)]
    if unmatched and not config.allow_unmatched:
        leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        findings = [
            f'{name}: "{key}" matches none of the adapted modules ({", ".join(leaves)}).{did_you_mean(key, leaves)} '
            "Take it out, or set allow_unmatched=True"
            for key in unmatched
        ]
        raise_findings(TargetError, f"keys of {name} that match nothing", findings)
    return {key: value for key, value in pattern.items() if key not in unmatched}


def _stacked(config: LoraConfig, survey: Survey) -> list[str]:
    """Return the paths of stacked weights of fused experts that `target_parameters` mean.

    Raises:
        TargetError: a name that means none.
    """
    names = list(config.target_parameters or ())
    unmatched = [name for name in names if not any(ends(path, name) for path in survey.experts)]
    findings = [
        f'target_parameters: "{name}" means no stacked weight of experts in {survey.model_name}.'
        f"{did_you_mean(name, survey.experts)} There are: "
        f"{', '.join(dict.fromkeys('.'.join(path.split('.')[-2:]) for path in survey.experts)) or 'none'}; other "
        "parameters belong to layers, which target_modules name. Take it out, or set allow_unmatched=True"
        for name in unmatched
        if not config.allow_unmatched
    ]
    raise_findings(TargetError, f"target_parameters for {survey.model_name}", findings)
    return [path for path in survey.experts if any(ends(path, name) for name in names)]


def _warn_of_experts(config: LoraConfig, survey: Survey) -> None:
    left = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in survey.experts))
    if left and not config.target_parameters:
        warnings.warn(
            f'"all-linear" means linear layers; the fused experts of {survey.model_name} ({", ".join(left)}) are no '
            f"such layers and are left out. To adapt them too: target_parameters={left!r}.",
            stacklevel=4,
        )


def _default(survey: Survey) -> set[str]:
    names = default_names(survey.called)
    if names is None:
        raise TargetError(
            f"target_modules is None, and {survey.model_name} has no layers of the usual names to choose. "
            f'{survey.found()} Name some, or give "all-linear".'
        )
    meant = [path for path in survey.called if survey.canonical[path] == path and path.rpartition(".")[2] in names]
    good = [path for path in meant if path in survey.adaptable]
    return set(names if len(good) == len(meant) else good)


def _all_linear(config: LoraConfig, model: nn.Module, survey: Survey) -> list[str]:
    """PEFT's rule: every linear layer but the output embedding, or but a classification's head where there is none."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is None and config.task_type == TaskType.SEQ_CLS:
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        head = next((one for one in heads if one is not None), None)
    linear = [path for path, layer in survey.linear.items() if layer is not head]
    if not linear:
        raise TargetError(f"{survey.model_name} has no linear layer that could be adapted.")
    return linear


def _whole_names(names: list[str] | None, survey: Survey) -> list[str] | None:
    """Return names of whole parts of paths for what PEFT means by these: `norm` is any name that ends so, to PEFT."""
    found: dict[str, None] = {}
    for name in names or ():
        hits = [path for path in survey.called if path.endswith(name)]
        length = name.count(".") + 1
        found |= dict.fromkeys(".".join(path.split(".")[-length:]) for path in hits) if hits else {name: None}
    return list(found) if names is not None else None


def _heads(config: LoraConfig, model: nn.Module) -> list[str]:
    if config.task_type is None:
        return []
    names = HEADS.get(str(TaskType(config.task_type)), ())
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in names if name in last]


def _dtype(layers: Iterable[nn.Module], autocast: bool) -> AdapterDtype:
    """Return how the adapter of these layers is stored: in fp32, but for fp64, and 16 bits without autocast."""
    kinds = {one.dtype for layer in layers for one in layer.parameters(recurse=False)}
    return "base" if torch.float64 in kinds or (kinds & NARROW and not autocast) else "float32"


def _is_all_linear(value: object) -> bool:
    return isinstance(value, str) and value.lower() == "all-linear"


def _listed(config: LoraConfig) -> str:
    """Return a hint where a string, which is one expression, looks like names."""
    said = config.target_modules
    names = re.split(r"[\s,]+", said.strip()) if isinstance(said, str) else []
    if not names or not all(re.fullmatch(r"[\w.]+", name) for name in names):
        return ""
    return f" A string is one regular expression for the whole path; for names give {names!r}."


def _shown(value: object) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)


def refuse_foreign(config: object) -> None:
    """Raise ConfigError unless this is a LoraConfig of ours."""
    if not isinstance(config, LoraConfig):
        kind = type(config)
        raise ConfigError(
            f"the configuration is a {kind.__module__}.{kind.__qualname__}; "
            "allowed: sideroad.peft.LoraConfig (change the import of the configuration too)."
        )


def placed_config(value: Adapter, model: nn.Module, *, autocast: bool) -> AdapterConfig:
    """Return a finished adapter's configuration with the type that its tensors get on this model."""
    handle = attached(model)
    survey = Survey(model) if handle is None else handle.survey()
    layers = [survey.modules[path] for path in value.weights if path in survey.modules]
    return value.config.model_copy(update={"dtype": _dtype(layers, autocast)})
