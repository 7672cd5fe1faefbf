"""A model with four adapters that overlap in part, and a batch whose rows choose among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import fill, tiny_llama
from torch import Tensor

from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.route import Names

IDS = (torch.arange(6)[:, None] * 13 + torch.arange(7) * 5) % 97 + 3
"""Six different rows of seven tokens."""

CONFIGS = {
    "a": AdapterConfig(targets="q_proj"),
    "b.2": AdapterConfig(targets=("q_proj", "v_proj"), method=LoraMethod(rank=2)),
    "all": AdapterConfig(method=LoraMethod(rank=4)),
    "apart": AdapterConfig(targets="down_proj", layers="1"),
}
ROWS: list[Names | None] = ["all", None, {"a": 0.5, "b.2": -2.0}, "apart", ["apart", "a"], "all"]


def four(model: Any = None) -> Attached:
    model = tiny_llama() if model is None else model
    for name, config in CONFIGS.items():
        fill(attach(model, config, name), name)
    handle = attached(model)
    assert handle is not None
    return handle


def logits(handle: Attached, ids: Tensor = IDS) -> Tensor:
    return handle.model(ids).logits.detach()


def alone(handle: Attached, names: Names | None, run: Callable[[], Tensor]) -> Tensor:
    with handle.using(() if names is None else names):
        return run()
