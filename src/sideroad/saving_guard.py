"""Stands before `save_pretrained` while adapters are attached: it would write adapter keys into a model file."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from torch import nn

from sideroad.errors import AdapterError
from sideroad.route import walk

METHOD = "save_pretrained"
_ASIDE = "_sideroad_save_pretrained"


def guard(model: nn.Module) -> None:
    """Make `save_pretrained` of the model and of every model inside it refuse; plain modules have none."""
    for _, module in walk(model):
        if callable(getattr(module, METHOD, None)) and not _guarded(module):
            if METHOD in module.__dict__:
                module.__dict__[_ASIDE] = module.__dict__[METHOD]
            # an instance attribute, and a partial of a plain function: it is copied and pickled with the model
            module.__dict__[METHOD] = partial(_refuse, type(module).__name__)


def unguard(model: nn.Module) -> None:
    """Give every module its own `save_pretrained` back."""
    for _, module in walk(model):
        if _guarded(module):
            del module.__dict__[METHOD]
            if _ASIDE in module.__dict__:
                module.__dict__[METHOD] = module.__dict__.pop(_ASIDE)


def _guarded(module: nn.Module) -> bool:
    present = module.__dict__.get(METHOD)
    return isinstance(present, partial) and present.func is _refuse


def _refuse(model_name: str, *args: object, **kwargs: object) -> NoReturn:
    raise AdapterError(
        f"save_pretrained on this {model_name} would write adapter tensors into the model's file. Save one of these:\n"
        "  the adapter:      attached(model).adapter(name).save(directory)\n"
        "  the merged model: attached(model).merge_and_unload().save_pretrained(directory)\n"
        "  the base:         attached(model).detach(), then model.save_pretrained(directory)"
    )
