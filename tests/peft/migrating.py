"""What the rows of the migration guide are checked with: the same program with PEFT, the front door and the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
from pairs import both, config, logits, quiet, relative
from tiny import tiny_llama
from torch import nn

from sideroad import AdapterConfig, Attached, LoraMethod, attach
from sideroad import peft as door

METHOD = LoraMethod(rank=4, alpha=8)
OWN: dict[str, Any] = {"targets": ("q_proj", "v_proj"), "method": METHOD}
"""The core's configuration that means `pairs.QV`."""


def own(**changes: Any) -> AdapterConfig:
    return AdapterConfig(**{**OWN, **changes})


def three(
    fields: dict[str, Any] | None = None, mine: dict[str, Any] | None = None, make: Callable[[], nn.Module] = tiny_llama
) -> tuple[door.PeftModel, Any, Attached]:
    """The front door's model, PEFT's, and the core's handle, with the same tensors."""
    ours, theirs = both(make, **(fields or {}))
    handle = attach(make(), own(**(mine or {})))
    filled = ours.base_model.handle.adapter("default")
    value = replace(handle.adapter("default"), weights=filled.weights, modules=filled.modules)
    handle.load("default", value)
    return ours, theirs, handle


def alike(
    fields: dict[str, Any] | None = None, mine: dict[str, Any] | None = None, make: Callable[[], nn.Module] = tiny_llama
) -> tuple[door.PeftModel, Any, Attached]:
    """Assert that all three say the same, and something else than the base."""
    ours, theirs, handle = three(fields, mine, make)
    agree(ours, theirs, handle)
    assert relative(logits(ours), logits(make())) > 1e-3
    return ours, theirs, handle


def agree(ours: Any, theirs: Any, handle: Attached | None = None) -> None:
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    if handle is not None:
        assert relative(logits(handle.model), logits(theirs)) <= 1e-5


def two() -> tuple[door.PeftModel, Any, Attached]:
    """All three with adapters "default" and "b"."""
    ours, theirs, handle = three()
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "k_proj"]}
    ours.add_adapter("b", config(**fields))
    torch.manual_seed(4)
    for name, one in ours.named_parameters():
        if ".lora.b." in name:
            one.data.normal_(std=0.1)
    with quiet():
        theirs.add_adapter("b", peft.LoraConfig(**fields))
        peft.set_peft_model_state_dict(theirs, door.get_peft_model_state_dict(ours, adapter_name="b"), "b")
    attach(handle.model, ours.base_model.handle.adapter("b"), "b", trainable=False)
    return ours, theirs, handle


def trained(model: nn.Module) -> set[str]:
    """Names of the adapters of ours that are trainable."""
    found = (name.split(".lora.")[1] for name, one in model.named_parameters() if one.requires_grad)
    return {rest.rpartition(".")[0] for rest in found}


def trained_by_peft(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name, one in model.named_parameters() if one.requires_grad}
