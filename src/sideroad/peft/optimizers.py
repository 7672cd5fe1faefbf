"""LoRA+: another learning rate for B than for A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from sideroad.errors import AdapterError, ConfigError


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Make an optimizer of the trainable parameters in which every B learns `loraplus_lr_ratio` times as fast.

    LoRA+ (arXiv:2402.12354, sec. 4). As in PEFT, vectors (biases) learn as fast as B and do not decay, and the pairs of
    embeddings have a rate of their own.

    Args:
        lr: of A and of all that is not named here.
        loraplus_lr_ratio: from 1 on.
        kwargs: for `optimizer_cls`.
    Raises:
        ConfigError: a ratio below 1.
        AdapterError: nothing is trainable.
    """
    if loraplus_lr_ratio < 1:
        raise ConfigError(f"loraplus_lr_ratio is {loraplus_lr_ratio}; B learns at least as fast as A: give 1 or more.")
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    embedded: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        path, found, _ = name.partition(".lora.")
        if not parameter.requires_grad:
            continue
        if found and name[-2:] in (".A", ".B") and isinstance(model.get_submodule(path), nn.Embedding):
            embedded.append(parameter)
        elif parameter.ndim == 1:
            undecayed.append(parameter)
        else:
            (fast if found and name.endswith(".B") else slow).append(parameter)
    groups = [
        {"params": slow, "lr": lr, "weight_decay": loraplus_weight_decay},
        {"params": embedded, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        {"params": fast, "lr": lr * loraplus_lr_ratio, "weight_decay": loraplus_weight_decay},
        {"params": undecayed, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):
        raise AdapterError("no parameter of this model is trainable; choose an adapter with set_adapter first.")
    return optimizer_cls([group for group in groups if group["params"]], lr=lr, **kwargs)  # type: ignore[call-arg]
