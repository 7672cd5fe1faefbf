"""What attach does to the base besides adding to its layers, and the way back: freezing, guarding, the handle."""

from __future__ import annotations

from torch import nn

from sideroad.route import walk
from sideroad.saving_guard import guard, unguard

HANDLE = "_sideroad_attached"
"""Attribute of the model that holds its handle; it is copied and pickled with the model."""

_NESTED = "_sideroad_nested"
"""Attribute of an `nn.TransformerEncoder` that used nested tensors before it was held."""


def take_hold(model: nn.Module, handle: object) -> dict[str, bool]:
    """Freeze the base, guard its saving, keep its batches padded, and store the handle on it.

    In eval mode `nn.TransformerEncoder` makes nested tensors of batches with a padding mask, which neither hooks nor
    attention outside torch's fused layer can read; padded places then hold what was computed there instead of zeros.

    Returns:
        Parameter name -> `requires_grad` as it was, shared parameters under each of their names.
    """
    import torch._dynamo.config as dynamo  # here because it takes a second to import

    # without it, a compiled model does not notice hooks that come or go
    dynamo.skip_nnmodule_hook_guards = False
    flags = {name: one.requires_grad for name, one in model.named_parameters(remove_duplicate=False)}
    model.requires_grad_(False)
    guard(model)
    for _, module in walk(model):
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor, module.__dict__[_NESTED] = False, True
    model.__dict__[HANDLE] = handle
    return flags


def let_go(model: nn.Module, flags: dict[str, bool]) -> None:
    """Undo `take_hold`; a parameter that is no longer there is passed over."""
    model.__dict__.pop(HANDLE, None)
    unguard(model)
    for _, module in walk(model):
        if module.__dict__.pop(_NESTED, False):
            module.use_nested_tensor = True  # type: ignore[assignment]
    present = dict(model.named_parameters(remove_duplicate=False))
    for name, flag in flags.items():
        if name in present:
            present[name].requires_grad_(flag)
