"""What attach does to the base besides adding to its layers, and the way back: freezing, guarding, the handle."""

from __future__ import annotations

from torch import nn

from sideroad.saving_guard import guard, unguard

HANDLE = "_sideroad_attached"
"""Attribute of the model that holds its handle; it is copied and pickled with the model."""


def take_hold(model: nn.Module, handle: object) -> dict[str, bool]:
    """Freeze the base, guard its saving, and store the handle on it.

    Returns:
        Parameter name -> `requires_grad` as it was, shared parameters under each of their names.
    """
    import torch._dynamo.config as dynamo  # here because it takes a second to import

    # without it, a compiled model does not notice hooks that come or go
    dynamo.skip_nnmodule_hook_guards = False
    flags = {name: one.requires_grad for name, one in model.named_parameters(remove_duplicate=False)}
    model.requires_grad_(False)
    guard(model)
    model.__dict__[HANDLE] = handle
    return flags


def let_go(model: nn.Module, flags: dict[str, bool]) -> None:
    """Undo `take_hold`; a parameter that is no longer there is passed over."""
    model.__dict__.pop(HANDLE, None)
    unguard(model)
    present = dict(model.named_parameters(remove_duplicate=False))
    for name, flag in flags.items():
        if name in present:
            present[name].requires_grad_(flag)
