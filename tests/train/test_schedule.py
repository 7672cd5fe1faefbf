"""Learning-rate schedules against their closed forms, above all at the ends."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sideroad.train.schedule import factor, warmup_length
from sideroad.train.settings import OptimConfig


def factors(steps: int, **settings: Any) -> list[float]:
    config = OptimConfig(**settings)
    return [factor(config, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warmup_rises_in_a_line_to_one(schedule: str) -> None:
    found = factors(20, schedule=schedule, warmup_steps=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0


def test_constant_stays() -> None:
    assert set(factors(10, schedule="constant", warmup_steps=0)) == {1.0}


def test_linear_falls_to_its_floor() -> None:
    found = factors(10, schedule="linear", warmup_steps=0, min_lr_ratio=0.2)
    assert found == pytest.approx([1 - 0.08 * step for step in range(11)])
    assert found[10] == pytest.approx(0.2)


def test_cosine_halves_in_the_middle() -> None:
    found = factors(12, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    assert (found[2], found[7], found[12]) == pytest.approx((1.0, 0.55, 0.1))
    assert found[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.2)) / 2)


def test_wsd_is_flat_and_then_falls() -> None:
    found = factors(20, schedule="wsd", warmup_steps=2, decay_ratio=0.25, min_lr_ratio=0.5)
    assert found[2:16] == [1.0] * 14
    assert found[15:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


def test_warmup_from_a_ratio_rounds_up_and_fits() -> None:
    assert warmup_length(OptimConfig(warmup_ratio=0.03), 100) == 3
    assert warmup_length(OptimConfig(warmup_ratio=0.03), 101) == 4
    assert warmup_length(OptimConfig(warmup_ratio=0.0), 100) == 0
    assert warmup_length(OptimConfig(warmup_steps=500), 100) == 100


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_learn_at_every_step(schedule: str, steps: int) -> None:
    found = factors(steps, schedule=schedule)[:steps]
    assert all(0 < value <= 1 for value in found)
