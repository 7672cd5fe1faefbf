"""What adapters there are and what they do at the moment, as PEFT's status objects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from sideroad.attaching import attached
from sideroad.errors import AdapterError
from sideroad.kinds.experts import ExpertWeight, layer_at
from sideroad.methods import parameters_of
from sideroad.methods.lora import BiasDelta
from sideroad.methods.replaced import Replaced
from sideroad.methods.rows import RowsDelta
from sideroad.peft.unwrapping import tuner_of
from sideroad.route import find_delta

TOKENS = "TrainableTokensLayer"
"""What PEFT calls trained rows of an embedding."""

Flag = bool | Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer. `name` is its path below the LoraModel (or in the model), `module_type` such as `lora.Linear`;
    the dictionaries are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model; "irregular" stands where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Flag
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of every adapted layer, in the model's order.

    Args:
        model: a PeftModel, or a model with injected adapters.
    Raises:
        AdapterError: it has no adapters.
    """
    tuner = tuner_of(model)
    base = model if tuner is None else tuner.model
    handle = attached(base)
    if handle is None:
        raise AdapterError(f"this {type(base).__name__} has no adapters, so there is no status.")
    active = list(handle.active) if tuner is None else tuner.active_adapters
    present: dict[str, dict[str, list[nn.Parameter]]] = {}
    words: dict[str, str] = {}
    for name in handle.names:
        for path in handle.paths(name):
            delta = find_delta(base, path, name)
            if not isinstance(delta, BiasDelta):
                present.setdefault(path, {})[name] = list(parameters_of(delta).values())
                words.setdefault(path, _word(delta, layer_at(base, path)))
    return [
        TunerLayerStatus(
            name=f"{'' if tuner is None else 'model.'}{path}{'.token_adapter' if words[path] == TOKENS else ''}",
            module_type=words[path],
            enabled=True if tuner is None else tuner.enabled,
            active_adapters=list(active),
            merged_adapters=[name for name in handle.merged_names if name in present[path]],
            requires_grad={name: flag(p.requires_grad for p in found) for name, found in present[path].items()},
            available_adapters=sorted(present[path]),
            devices={name: sorted({p.device.type for p in found}) for name, found in present[path].items()},
            quantization_backend=None,
        )
        for path in handle.survey().modules
        if path in present
    ]


def _word(delta: nn.Module, layer: nn.Module) -> str:
    if isinstance(delta, Replaced):
        return "ModulesToSaveWrapper"
    if isinstance(layer, ExpertWeight):
        return "lora.ParamWrapper"
    return TOKENS if isinstance(delta, RowsDelta) else f"lora.{type(layer).__name__}"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of a model's adapters.

    Args:
        model: a PeftModel, or a model with injected adapters.
    Raises:
        AdapterError: it has no adapters.
    """
    tuner = tuner_of(model)
    layers = get_layer_status(model)
    base = model if tuner is None else tuner.model
    names = sorted({name for layer in layers for name in layer.available_adapters})
    trainable, total = count_parameters(model)
    grads = {name: [one.requires_grad[name] for one in layers if name in one.requires_grad] for name in names}
    devices = {name: sorted({d for one in layers for d in one.devices.get(name, ())}) for name in names}
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    return TunerModelStatus(
        base_model_type=type(base).__name__ if tuner is not None or hasattr(base, "config") else "other",
        adapter_model_type="None" if tuner is None else "LoraModel",
        peft_types={} if tuner is None else dict.fromkeys(tuner.peft_config, "LORA"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,
        active_adapters=layers[0].active_adapters,
        merged_adapters=merged,
        requires_grad={name: found[0] if len(set(found)) == 1 else "irregular" for name, found in grads.items()},
        available_adapters=names,
        devices=devices,
        quantization_backend=None,
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many values are trainable, and how many there are, shared ones once."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def flag(values: Iterable[bool]) -> Flag:
    """Return what all values are, or "irregular"."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
