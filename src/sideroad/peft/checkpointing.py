"""Activation checkpointing of the base: gradients need an input that requires them."""

from __future__ import annotations

from typing import Any

from torch import nn


def recomputes(model: nn.Module) -> bool:
    """Say whether a model recomputes activations, by the newer or the older name of the question."""
    newer = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if newer is None else newer)


def feed_gradients(model: nn.Module) -> bool:
    """Make a model's inputs require gradients, without which reentrant checkpointing gives none; say if it could."""
    base: Any = model
    if hasattr(base, "enable_input_require_grads"):
        base.enable_input_require_grads()
        return True
    return False


def starve_gradients(model: nn.Module) -> None:
    """Undo `feed_gradients`."""
    base: Any = model
    if hasattr(base, "disable_input_require_grads"):
        base.disable_input_require_grads()
