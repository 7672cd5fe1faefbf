"""The methods that `bench/methods.py` compares, one entry each, and how an entry is put on a model.

Unless an entry exists to vary them, rank, targets and scale are the same: rank 8 on all linear layers, a scale of 2. An
entry that the installed sideroad does not know is skipped with its reason, so the table may run ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, validate
from sideroad.errors import ConfigError
from sideroad.methods.budget import budget_for

NAME = "default"
ENCODER, CAUSAL = "encoder", "causal"
Batches = Callable[[], Sequence[Mapping[str, Tensor]]]
"""Gives the first training batches, as arguments of the model, to inits that look at data."""


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        what: for the table and the plot.
        trains: an adapter, all weights, or nothing but a classifier's head.
        adapter: the `method` section of a recipe.
        optim: what differs in the `optim` section, the learning rate aside.
        centre: where the sweep begins on each kind of model, in half-decades: the rate is 10^(centre / 2).
        sees_data: its first tensors depend on training batches.
    """

    what: str
    centre: Mapping[str, int]
    trains: Literal["adapter", "all", "head"] = "adapter"
    adapter: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    sees_data: bool = False


def _at(encoder: int, causal: int) -> dict[str, int]:
    return {ENCODER: encoder, CAUSAL: causal}


def _lora(**changed: Any) -> dict[str, Any]:
    return {"kind": "lora", "rank": 8, "alpha": 16, **changed}


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", _at(-7, -8), trains="all"),
    "head": Method("head alone, model frozen", _at(-4, -4), trains="head"),
    "lora": Method("LoRA, rank 8", _at(-5, -5), adapter=_lora()),
    "lora-r2": Method("LoRA, rank 2", _at(-5, -5), adapter=_lora(rank=2, alpha=4)),
    "lora-r32": Method("LoRA, rank 32", _at(-5, -5), adapter=_lora(rank=32, alpha=64)),
    "rslora-r32": Method("rsLoRA, rank 32", _at(-6, -6), adapter=_lora(rank=32, alpha=16, scaling="alpha/sqrt(r)")),
    "lora-gaussian": Method("LoRA, A gaussian", _at(-5, -5), adapter=_lora(init="gaussian")),
    "lora+": Method("LoRA+, ratio 16", _at(-7, -7), adapter=_lora(), optim={"lr_ratio_b": 16.0}),
    "lora-fa": Method("LoRA-FA", _at(-5, -5), adapter=_lora(trains="B")),
    "pissa": Method("PiSSA", _at(-6, -6), adapter=_lora(init="pissa")),
    "olora": Method("OLoRA", _at(-6, -6), adapter=_lora(init="olora")),
    "eva": Method("EVA", _at(-5, -5), adapter=_lora(init="eva"), sees_data=True),
    "lora-ga": Method("LoRA-GA", _at(-6, -6), adapter=_lora(init="lora-ga"), sees_data=True),
    "dora": Method("DoRA", _at(-5, -5), adapter=_lora(kind="dora")),
    "adalora": Method("AdaLoRA, 12 to 8", _at(-4, -4), adapter=_lora(kind="adalora", rank=12, target_rank=8)),
}


def refusal(name: str) -> str | None:
    """Return why the installed sideroad cannot run an entry; None if it can."""
    method = METHODS[name]
    if method.trains != "adapter":
        return None
    try:
        config_of(method)
    except ConfigError as error:
        return " ".join(str(error).split())
    return None


def config_of(method: Method) -> AdapterConfig:
    """Return the adapter that an entry asks for.

    Raises:
        ConfigError: the installed sideroad has no such method, init or option.
    """
    return validate(AdapterConfig, {"targets": "all-linear", "method": dict(method.adapter)}, "bench/method_table.py")


@dataclass(frozen=True)
class Adapted:
    """What an entry has put on a model.

    Attributes:
        parameters: what it trains, by name; a classifier's head is the caller's.
        budget: gives AdaLoRA's budget for a run of so many steps; None for the others.
    """

    parameters: Mapping[str, nn.Parameter]
    budget: Callable[[int], Any] | None = None


def adapt(
    model: nn.Module, method: Method, seed: int, batches: Batches, exclude: tuple[str, ...] = ()
) -> Adapted:
    """Put an entry on a model.

    Args:
        batches: called for an init that looks at data.
        exclude: layers that no adapter gets, as in a recipe.
    """
    if method.trains == "head":
        return Adapted({})
    if method.trains == "all":
        return Adapted(dict(model.requires_grad_(True).named_parameters()))
    arguments: dict[str, Any] = {"batches": batches()} if method.sees_data else {}
    config = config_of(method).model_copy(update={"exclude": exclude})
    handle: Attached = attach(model, config, NAME, seed=seed, **arguments)
    trained = {name: one for name, one in handle.parameters(NAME).items() if one.requires_grad}
    return Adapted(trained, lambda steps: budget_for(handle.deltas(NAME), config.method, steps))
