"""Parameter groups, and the optimizer's state as named tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sideroad.errors import CheckpointError
from sideroad.train import optimizer
from sideroad.train.settings import OptimConfig


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.q.A": (2, 4), "layers.0.q.B": (4, 2), "layers.0.q.bias": (4,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def stepped(named: dict[str, nn.Parameter], built: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        for index, parameter in enumerate(named.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + index + 1))
        built.step()


def test_groups_follow_lora_plus() -> None:
    built = optimizer.build(parameters(), OptimConfig(lr=1e-3, lr_ratio_b=16, weight_decay=0.1))
    found = {group["kind"]: (group["lr"], group["weight_decay"]) for group in built.param_groups}
    assert found == {"A": (1e-3, 0.1), "B": (16e-3, 0.1), "bias": (1e-3, 0.0)}
    assert optimizer.set_rate(built, 0.5) == 0.5e-3
    assert [group["lr"] for group in built.param_groups] == [0.5e-3, 8e-3, 0.5e-3]


def test_a_ratio_of_one_is_plain_adamw() -> None:
    mine, plain = parameters(), parameters()
    stepped(mine, optimizer.build(mine, OptimConfig(lr=1e-2)), 3)
    stepped(plain, torch.optim.AdamW(plain.values(), lr=1e-2, weight_decay=0.0), 3)
    assert all(torch.equal(mine[name], plain[name]) for name in mine)


def test_state_goes_out_and_in_bit_for_bit() -> None:
    straight, stopped = parameters(), parameters()
    config = OptimConfig(lr=1e-2, lr_ratio_b=4)
    stepped(straight, optimizer.build(straight, config), 5)
    first = optimizer.build(stopped, config)
    stepped(stopped, first, 2)
    tensors = optimizer.state_tensors(first, stopped)
    assert set(tensors) == {f"{name}/{moment}" for name in stopped for moment in ("step", "exp_avg", "exp_avg_sq")}
    second = optimizer.build(stopped, config)
    optimizer.load_state(second, stopped, tensors)
    for step in range(2, 5):
        for index, parameter in enumerate(stopped.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + index + 1))
        second.step()
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


def test_state_that_does_not_fit_is_refused() -> None:
    named = parameters()
    built = optimizer.build(named, OptimConfig())
    stepped(named, built, 1)
    tensors = optimizer.state_tensors(built, named)
    tensors["layers.0.q.A/exp_avg"] = torch.zeros(3, 4)
    del tensors["layers.0.q.B/step"]
    with pytest.raises(CheckpointError, match=r"missing layers.0.q.B/step; layers.0.q.A/exp_avg has shape \[3, 4\]"):
        optimizer.load_state(built, named, tensors)


def test_the_norm_is_over_all_gradients() -> None:
    named = parameters()
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    assert float(optimizer.gradient_norm(named.values())) == pytest.approx(20**0.5)
    named["layers.0.q.A"].grad[0, 0] = float("nan")  # type: ignore[index]
    assert not torch.isfinite(optimizer.gradient_norm(named.values()))


def test_a_step_passes_over_experts_that_nothing_has_visited() -> None:
    torch.manual_seed(0)
    one, twin = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    made = [optimizer.build({"e.A": parameter}, OptimConfig(lr=0.1, weight_decay=0.1)) for parameter in (one, twin)]
    for step in range(3):
        gradient = torch.randn(6, 4)
        gradient[2:4] *= step != 1
        one.grad, twin.grad = gradient.clone(), gradient.clone()
        before = one.detach().clone()
        with optimizer.idle_experts_kept({one: 3}):
            made[0].step()
        made[1].step()
        moved = (one.detach() != before).view(3, -1).any(1).tolist()
        assert moved == [True, step != 1, True]
    assert torch.equal(one[:2], twin[:2])
    assert not torch.equal(one[2:4], twin[2:4])
