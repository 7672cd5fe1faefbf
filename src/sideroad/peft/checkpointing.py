"""Activation checkpointing of the base: gradients need an input that requires them."""

from __future__ import annotations

from typing import Any

from torch import nn


def feed_gradients(model: nn.Module) -> bool:
    """Make the inputs of a model that recomputes activations require gradients, and say if that was done here.

    Without it, reentrant checkpointing gives no gradient at all: the base is frozen, and so no input needs one.
    transformers does it itself for text when checkpointing is switched on.
    """
    base: Any = model
    recomputes = getattr(base, "is_activation_checkpointing", None)
    if recomputes is None:
        recomputes = getattr(base, "is_gradient_checkpointing", False)
    if not recomputes or not hasattr(base, "enable_input_require_grads") or getattr(base, "_require_grads_hooks", None):
        return False
    base.enable_input_require_grads()
    return True


def starve_gradients(model: nn.Module) -> None:
    """Undo `feed_gradients`."""
    base: Any = model
    if hasattr(base, "disable_input_require_grads"):
        base.disable_input_require_grads()
