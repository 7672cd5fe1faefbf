"""Optimizers for pairs: LoRA+, whose B learns faster than A, and LoRA-FA, which trains B alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sideroad.errors import AdapterError, ConfigError, raise_findings
from sideroad.methods.lora import LoraDelta
from sideroad.methods.lora_fa import correction
from sideroad.peft.unwrapping import tuner_of


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


class LoraFaAdamW(AdamW):
    """AdamW that sees a corrected gradient of every B (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303, sec. 3.2).

        g' = g (A Aᵀ)⁻¹ / s²

    A stays as it is. `.grad` keeps g, so that a step may be made again, and clipping acts on g as in PEFT.

    Args:
        deltas: the pairs; each B that has a gradient is corrected.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], deltas: Sequence[LoraDelta], *, lr: float, weight_decay: float
    ) -> None:
        super().__init__(params, lr=lr, eps=1e-6, weight_decay=weight_decay)
        self.deltas = tuple(deltas)
        self._kept: dict[int, tuple[tuple[int, float], Tensor]] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; `closure` computes the loss and the gradients before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plain = [(delta, delta.B.grad) for delta in self.deltas if delta.B.grad is not None]
        try:
            for delta, gradient in plain:
                flat = gradient.flatten(1) @ self._correction(delta).to(gradient)
                delta.B.grad = flat.view_as(gradient)
            super().step()
        finally:
            for delta, gradient in plain:
                delta.B.grad = gradient
        return loss

    def _correction(self, delta: LoraDelta) -> Tensor:
        """Return the matrix of one pair, computed again when A or s has changed."""
        now = delta.A._version, delta.scale
        kept = self._kept.get(id(delta))
        if kept is None or kept[0] != now:
            kept = self._kept[id(delta)] = now, correction(delta.A, delta.scale)
        return kept[1]


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFaAdamW:
    """Freeze every A and make an optimizer of what is trainable, in which every B has LoRA-FA's gradient.

    A layer's input is then not kept for the backward pass. Every layer's own rank and scale count, so `r`, `lora_alpha`
    and `use_rslora` are without effect.

    Args:
        model: a PeftModel.
    Raises:
        AdapterError: no PeftModel, nothing is trainable, or pairs for which the correction does not hold (DoRA, and
            those of embeddings, whose A is zero at the start).
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise AdapterError(f"this {type(model).__name__} is no PeftModel; LoraMethod(trains='B') does the same.")
    pairs = [
        (path, delta)
        for name in tuner.handle.names
        for path, delta in tuner.handle.deltas(name).items()
        if isinstance(delta, LoraDelta) and delta.B.requires_grad
    ]
    wrong = [
        f"{path} ({type(tuner.model.get_submodule(path)).__name__}) has a {type(delta).__name__}, for which LoRA-FA's "
        "correction does not hold; leave the layer out, or take another optimizer."
        for path, delta in pairs
        if type(delta) is not LoraDelta or isinstance(tuner.model.get_submodule(path), nn.Embedding)
    ]
    raise_findings(AdapterError, "create_lorafa_optimizer", wrong)
    for _, delta in pairs:
        delta.A.requires_grad_(False)
    trained = [one for one in model.parameters() if one.requires_grad]
    if not trained:
        raise AdapterError("no parameter of this model is trainable; choose an adapter with set_adapter first.")
    return LoraFaAdamW(trained, [delta for _, delta in pairs], lr=lr, weight_decay=weight_decay)
