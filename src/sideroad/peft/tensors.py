"""State dicts in PEFT's names: of an adapter, and of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sideroad.attaching import attached
from sideroad.errors import AdapterError, ConfigError, raise_findings
from sideroad.folding import fold, unfold
from sideroad.handle import Attached
from sideroad.kinds.experts import ExpertWeight, layer_at
from sideroad.peft.unwrapping import tuner_of
from sideroad.peft_experts import fold_experts, unfold_experts
from sideroad.peft_keys import EXPERTS, ROOT, from_tensors, to_tensors
from sideroad.route import CHILD, deltas_of, escape

State = dict[str, dict[str, Tensor]]
"""Module path → leaf (`A`, `B`, `bias`, `rows`, or the names of a module trained whole) → tensor."""


class Parts(NamedTuple):
    """An adapter's tensors: of layers, and of modules trained whole."""

    weights: State
    modules: State


class LoadResult(NamedTuple):
    """What loading left out; both are empty, since anything else raises."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names; they share memory with the model's, but for experts' B, and pairs
    whose start is subtracted: those are of twice the rank, as in files.

    Args:
        model: a PeftModel, or a model with injected adapters, whose names then have no `base_model.model.`.
        state_dict: the model's own state dict (a gathered one) to take the tensors from.
        unwrap_compiled: look inside `torch.compile`'s wrapper; it is looked for in any case.
        save_embedding_layers: must not be True; embeddings are saved where they are trained.
    Raises:
        AdapterError: no adapter of that name, or tensors missing in `state_dict`.
    """
    refuse_embeddings(save_embedding_layers)
    prefix, handle = _handle_of(model)
    parts = live_parts(handle, adapter_name)
    if state_dict is not None:
        parts = gathered(handle, adapter_name, state_dict, prefix)
    weights: Mapping[str, Mapping[str, Tensor]] = parts.weights
    if any(leaves.keys() & {"A0", "E"} for leaves in weights.values()):
        weights = fold(handle.adapter(adapter_name).config, weights)[1]
    kinds = handle.survey().kind_names(weights)
    named = to_tensors(fold_experts(weights, kinds), parts.modules, kinds)
    return named if prefix else {key.removeprefix(ROOT): tensor for key, tensor in named.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Overwrite an adapter's tensors in place from a state dict by PEFT's names.

    Args:
        ignore_mismatched_sizes: must not be set; a tensor that is left out in silence is one that is not loaded.
        low_cpu_mem_usage: without effect; nothing is made that is not kept.
    Raises:
        AdapterError: tensors that are missing, unknown or of another shape; all of them, and nothing is changed.
    """
    if ignore_mismatched_sizes:
        raise ConfigError("ignore_mismatched_sizes is not supported: leave out the tensors that do not fit yourself.")
    _, handle = _handle_of(model)
    named = {key if key.startswith(ROOT) else ROOT + key: tensor for key, tensor in peft_model_state_dict.items()}
    value = handle.adapter(adapter_name)
    found = from_tensors(named, list(value.modules))
    broken = [key for key, one in named.items() if one.is_floating_point() and not bool(torch.isfinite(one).all())]
    stacked = [path for path, kind in value.kinds.items() if kind == EXPERTS]
    findings = found.findings + unfold_experts(found, stacked, lambda path: value.ranks.get(path, 1))
    findings += [f"{key} has values that are NaN or infinite" for key in broken]
    raise_findings(AdapterError, "the state dict cannot be loaded", findings)
    weights = unfold(value.config, found.weights) or found.weights
    handle.load(adapter_name, replace(value, weights=weights, modules=found.modules))
    return LoadResult([], [])


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's state dict by its own names, without any adapter's tensors."""
    base = _base_of(model)
    return {key: tensor for key, tensor in base.state_dict().items() if not _is_adapters(base, key)}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load a plain base's state dict beneath the adapters.

    Returns:
        Names that are missing and unexpected; empty where `strict`.
    Raises:
        AdapterError: with `strict`, names that are missing or unexpected.
    """
    base = _base_of(model)
    own = get_base_model_state_dict(model)
    missing = [key for key in own if key not in state_dict]
    strange = [key for key in state_dict if key not in own]
    if strict:
        findings = [f"{key} is missing" for key in missing] + [f"{key} is not the base's" for key in strange]
        raise_findings(AdapterError, f"the state dict does not fit this {type(base).__name__}", findings)
    base.load_state_dict({key: state_dict[key] for key in own if key in state_dict}, strict=False)
    return LoadResult(missing, strange)


def live_parts(handle: Attached, name: str) -> Parts:
    """Return an adapter's live tensors, detached."""
    held = handle.state(name)
    return Parts(*({path: dict(parts) for path, parts in one.items()} for one in (held.tensors, held.modules)))


def gathered(handle: Attached, name: str, state_dict: Mapping[str, Tensor], prefix: str) -> Parts:
    """Return an adapter's tensors out of a whole model's state dict, in whose names every path starts with `prefix`.

    Raises:
        AdapterError: some are not there.
    """
    missing = []
    live, found = live_parts(handle, name), Parts({}, {})
    for here, there, inner in ((live.weights, found.weights, ""), (live.modules, found.modules, "copy.")):
        for path, leaves in here.items():
            for leaf in leaves:
                layer = layer_at(handle.model, path)
                at, own = (path.rpartition(".")[0], f"{layer.name}.") if isinstance(layer, ExpertWeight) else (path, "")
                key = f"{prefix}{at}.{CHILD}.{escape(name)}.{own}{inner}{leaf}"
                if key in state_dict:
                    there.setdefault(path, {})[leaf] = state_dict[key].detach()
                else:
                    missing.append(f"{key} is missing in the state dict")
    if missing and not (found.weights or found.modules):
        missing = [
            f'none of the {len(missing)} tensors of adapter "{name}" is in the state dict ({missing[0]}). A program '
            f'that filters names by "lora_" must filter by ".{CHILD}." here'
        ]
    raise_findings(AdapterError, f'adapter "{name}" is not whole in this state dict', missing)
    return found


def refuse_embeddings(save_embedding_layers: str | bool) -> None:
    """Raise ConfigError where copies of whole embeddings are asked for."""
    if save_embedding_layers not in ("auto", False):
        raise ConfigError(
            f"save_embedding_layers is {save_embedding_layers!r}; allowed: 'auto', False. What is trained is saved: "
            "name the embedding in target_modules, modules_to_save or trainable_token_indices."
        )


def _base_of(model: nn.Module) -> nn.Module:
    tuner = tuner_of(model)
    return tuner.model if tuner is not None else model._modules.get("_orig_mod") or model


def _handle_of(model: nn.Module) -> tuple[str, Attached]:
    """Return what PEFT puts before every path in this model's tensor names, and the handle."""
    base = _base_of(model)
    handle = attached(base)
    if handle is None:
        raise AdapterError(f"this {type(base).__name__} has no adapters.")
    return ("" if tuner_of(model) is None else ROOT), handle


def _is_adapters(base: nn.Module, key: str) -> bool:
    path, mark, _ = key.partition(f".{CHILD}.")
    return bool(mark) and deltas_of(base.get_submodule(path)) is not None
