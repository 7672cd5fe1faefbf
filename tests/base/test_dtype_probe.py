"""The probe's decision, with a clock that says what we like."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain, repeat

import pytest
import torch

from sideroad.base import dtype_probe
from sideroad.base.dtype_probe import choose_dtype, probe_cpu


def clock_of(single: float, half: float) -> Callable[[], float]:
    """A clock under which a float32 product takes `single` seconds and a bfloat16 one `half`."""
    per_turn = (0.0, single, 0.0, half, 0.0)
    steps = chain([0.0], [0.0, 9.0, 0.0, 9.0], chain.from_iterable(repeat(per_turn)))
    now = 0.0

    def read() -> float:
        nonlocal now
        now += next(steps)
        return now

    return read


@pytest.mark.parametrize(
    ("single", "half", "expected"),
    [
        (0.010, 0.005, torch.bfloat16),
        (0.0126, 0.010, torch.bfloat16),
        (0.0124, 0.010, torch.float32),
        (0.010, 0.020, torch.float32),
    ],
)
def test_bfloat16_only_when_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, single: float, half: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(dtype_probe, "_BUDGET_SECONDS", 1e9)
    choice = probe_cpu(clock=clock_of(single, half))
    assert choice.dtype is expected
    assert choice.seconds == pytest.approx({"float32": single, "bfloat16": half})
    assert f"{single * 1e3:.2f} ms in float32" in choice.reason


def test_a_slow_machine_makes_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dtype_probe.torch, "matmul", lambda left, right: calls.append(left.dtype))
    probe_cpu(clock=clock_of(1.0, 1.0))
    assert len(calls) == 4


def test_the_real_probe_is_short() -> None:
    start = time.process_time()
    choice = choose_dtype(torch.device("cpu"))
    assert choice.dtype in (torch.float32, torch.bfloat16)
    assert time.process_time() - start < 10


def test_other_devices_say_that_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype(torch.device("mps")).dtype is torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        choice = choose_dtype(torch.device("cuda"))
        assert choice.dtype is expected
        assert "not measured" in choice.reason
