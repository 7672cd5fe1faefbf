"""What a base needs before its adapters are trained on it, quantised or in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sideroad.errors import ConfigError

NARROW = (torch.float16, torch.bfloat16)
UNCAST = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""Ways of quantising whose 16-bit parameters stay as they are."""


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base, widen its 16-bit parameters to fp32, and for a quantised base switch checkpointing on.

    Call it before `get_peft_model`. With reentrant checkpointing, the embedding's output is made to require gradients.

    Args:
        gradient_checkpointing_kwargs: for the base's `gradient_checkpointing_enable`; non-reentrant by default.
        auto_clear_cache: give the freed memory back to the GPU.
    Raises:
        ConfigError: a quantised model that cannot switch checkpointing on.
    """
    method = getattr(model, "quantization_method", None)
    loaded = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    packed = str(method).lower().rpartition(".")[2] in UNCAST or getattr(model, "hqq_quantized", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not packed and parameter.dtype in NARROW and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (loaded or packed) and use_gradient_checkpointing:
        base: Any = model
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next((getattr(base, name) for name in names if hasattr(base, name)), None)
        if enable is None:
            raise ConfigError(
                f"{type(model).__name__} has no gradient_checkpointing_enable; pass use_gradient_checkpointing=False."
            )
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if hasattr(base, "enable_input_require_grads"):
            base.enable_input_require_grads()
        enable(options)
    return model
