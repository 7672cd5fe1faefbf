"""The rates of a run, what sharing saved, and how near it came to the machine's limit."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from sideroad.attaching import attach
from sideroad.config import AdapterConfig
from sideroad.train.speed import Work, expected_seconds, measure_limit, speed_of, work_of


def test_rates_are_those_of_the_steps_alone() -> None:
    records = [
        {"step": 1, "trained_tokens": 30, "real_tokens": 100, "computed_tokens": 60, "seconds": 1.0},
        {"step": 1, "validation_loss": 2.0},
        {"step": 2, "trained_tokens": 10, "real_tokens": 100, "computed_tokens": 100, "seconds": 3.0},
    ]
    work = Work(body=1000, below=0, head=500, adapter=10)
    speed = speed_of(records, work, limit=1e6)
    assert speed is not None
    assert (speed.trained_tokens_per_second, speed.real_tokens_per_second, speed.saved_tokens) == (10.0, 50.0, 40)
    assert speed.limit_share == pytest.approx((4060 * 160 + 2000 * 40) / 1e6 / 4.0)
    assert speed_of([records[1]], work, 1e6) is None


def test_padding_saves_nothing() -> None:
    record = {"trained_tokens": 1, "real_tokens": 10, "computed_tokens": 15, "seconds": 1.0}
    speed = speed_of([record], Work(1, 1, 1, 1), 1.0)
    assert speed is not None
    assert speed.saved_tokens == 0


def test_work_counts_each_product_once() -> None:
    model = tiny_llama()
    linear = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    handle = attach(model, AdapterConfig())
    trained = sum(parameter.numel() for parameter in handle.parameters("default").values())
    assert work_of(model, trained) == Work(linear, 0, 259 * 32, trained)
    half = list(model.model.layers[:1])
    assert work_of(model, trained, half) == Work(linear // 2, linear // 2, 259 * 32, trained)
    assert work_of(model, trained, half, kept=True) == Work(linear // 2, 0, 259 * 32, trained)


def test_a_run_on_upper_layers_is_not_said_to_beat_the_machine() -> None:
    record = {"trained_tokens": 10, "real_tokens": 100, "computed_tokens": 100, "seconds": 1.0}
    all_blocks, upper = Work(1200, 0, 0, 0), Work(100, 1100, 0, 0)
    shares = [speed_of([record], work, 1e6) for work in (all_blocks, upper, Work(100, 0, 0, 0))]
    assert [one and one.limit_share for one in shares] == pytest.approx([0.48, 0.26, 0.04])


def test_the_limit_is_measured_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    limit = measure_limit(torch.device("cpu"), torch.float32, tiny_llama())
    assert limit > 1e6
    assert torch.equal(torch.get_rng_state(), state)
    work = Work(1000, 0, 0, 0)
    assert expected_seconds(work, limit, 2000, 0) > expected_seconds(work, limit, 1000, 0) > 0
