"""AdamW over an adapter's parameters: who is in which group, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sideroad.errors import CheckpointError
from sideroad.train.settings import OptimConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def build(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, looked_up: Collection[str] = ()
) -> AdamW:
    """AdamW with up to three groups, each with its peak rate under `peak`:

        A and the like     lr                  weight decay
        B                  lr * lr_ratio_b     weight decay        LoRA+, Hayou et al. 2024, arXiv:2402.12354, eq. 6
        bias, magnitude    lr                  none

    On an embedding A is the factor that starts at zero (but for starts of its own), so there A is the fast one.

    Args:
        parameters: trainable ones; the last part of the dotted name (`A`, `B`, `bias`) chooses the group.
        looked_up: paths of embeddings whose A starts at zero.
    """
    members: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "bias": []}
    for name, parameter in parameters.items():
        path, _, kind = name.rpartition(".")
        if kind in ("A", "B") and path in looked_up:
            kind = "B" if kind == "A" else "A"
        kind = "bias" if kind == "magnitude" else kind
        members[kind if kind in members else "A"].append(parameter)
    rates = {"A": config.lr, "B": config.lr * config.lr_ratio_b, "bias": config.lr}
    groups = [
        {
            "params": members[kind],
            "kind": kind,
            "peak": rate,
            "lr": rate,
            "weight_decay": 0.0 if kind == "bias" else config.weight_decay,
        }
        for kind, rate in rates.items()
        if members[kind]
    ]
    # hundreds of small tensors: one call for all instead of eight for each
    fused = {parameter.device.type for parameter in parameters.values()} <= {"cpu", "cuda"}
    return AdamW(groups, betas=config.betas, eps=config.eps, fused=True if fused else None, foreach=None)


@contextmanager
def idle_experts_kept(stacked: Mapping[nn.Parameter, int]) -> Iterator[None]:
    """Let a step inside the block pass over experts that no token has visited since the last one.

    Their gradient is exactly zero, yet AdamW's momentum and weight decay would move them. Their moments decay as ever.

    Args:
        stacked: parameters that hold a pair for each expert, the expert slowest → how many experts.
    """
    kept = []
    for parameter, count in stacked.items():
        if parameter.grad is not None:
            idle = parameter.grad.view(count, -1).any(1).logical_not()
            rows = idle.repeat_interleave(parameter.shape[0] // count)[:, None]
            kept.append((parameter, rows, parameter.detach().clone()))
    yield
    with torch.no_grad():
        for parameter, idle, before in kept:
            parameter.copy_(torch.where(idle, before, parameter))


def set_rate(optimizer: AdamW, factor: float) -> float:
    """Set every group to `factor` times its peak; returns the first group's rate, which is A's where there is one."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def state_tensors(optimizer: AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as "<parameter>/<name>" → tensor; empty before the first step."""
    return {
        f"{name}/{moment}": optimizer.state[parameter][moment].detach().clone()
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_state(optimizer: AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape; the optimizer is then as it was.
    """
    if not tensors:
        return
    wanted = {f"{name}/{moment}" for name in parameters for moment in _MOMENTS}
    wrong = [f"missing {key}" for key in sorted(wanted - tensors.keys())]
    wrong += [f"unknown {key}" for key in sorted(tensors.keys() - wanted)]
    wrong += [
        f"{name}/exp_avg has shape {list(tensors[f'{name}/exp_avg'].shape)}, the parameter {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if f"{name}/exp_avg" in tensors and tensors[f"{name}/exp_avg"].shape != parameter.shape
    ]
    if wrong:
        raise CheckpointError(f"the checkpoint's optimizer state does not fit this adapter: {'; '.join(wrong[:8])}")
    names = {parameter: name for name, parameter in parameters.items()}
    saved: dict[str, Any] = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved["state"] = {
        index: {moment: tensors[f"{names[parameter]}/{moment}"].clone() for moment in _MOMENTS}
        for index, parameter in enumerate(ordered)
    }
    optimizer.load_state_dict(saved)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm over the gradients of all `parameters`, an fp32 scalar on their device; non-finite if any element is."""
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
