"""From a model of any wrapping to the LoraModel inside it."""

from __future__ import annotations

from torch import nn

from sideroad.peft.lora_model import LoraModel


def tuner_of(model: nn.Module) -> LoraModel | None:
    """Return the LoraModel of a PeftModel (compiled or not), or a LoraModel itself; None for other models."""
    model = model._modules.get("_orig_mod") or model
    inner = model if isinstance(model, LoraModel) else model._modules.get("base_model")
    return inner if isinstance(inner, LoraModel) else None
