"""lowrank: exact algebra, checked against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sideroad.errors import AdapterError
from sideroad.lowrank import LowRank


def random(out: int = 7, into: int = 9, rank: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return LowRank(make(rank, into), make(out, rank))


sizes = st.integers(1, 8)


@settings(max_examples=40)
@given(out=sizes, into=sizes, rank=sizes, keep=sizes, seed=st.integers(0, 99))
def test_algebra_agrees_with_dense(out: int, into: int, rank: int, keep: int, seed: int) -> None:
    low = random(out, into, rank, seed, torch.float64)
    other = random(out, into, keep, seed + 1, torch.float64)
    dense = low.B @ low.A
    values = torch.linalg.svdvals(dense)
    assert low.norm() == pytest.approx(float(dense.norm()), rel=1e-12)
    found = low.singular_values()
    torch.testing.assert_close(found, values[: len(found)], rtol=1e-9, atol=1e-12)
    total = low.add(other)
    assert total.rank == rank + keep
    torch.testing.assert_close(total.B @ total.A, dense + other.B @ other.A)
    small = low.truncate(keep)
    assert small.rank <= max(keep, 1)
    error = (dense - small.B @ small.A).norm()
    best = 0.0 if keep >= rank else float(values[keep:].square().sum().sqrt())
    assert float(error) == pytest.approx(best, abs=1e-9)


def test_truncate_shares_the_singular_values() -> None:
    small = random().truncate(2)
    torch.testing.assert_close(small.A @ small.A.t(), small.B.t() @ small.B)
    assert small.A.dtype == torch.float32
    same = random()
    assert same.truncate(3) is same


def test_norm_of_a_sum_that_cancels_is_zero() -> None:
    low = random()
    assert low.add(low.scaled(-1.0)).norm() < 1e-12 * low.norm()


def test_apply_is_fp32_whatever_the_factors_are() -> None:
    low = random(dtype=torch.bfloat16)
    weight = torch.randn(7, 9)
    changed = low.apply_to(weight)
    assert changed.dtype == torch.float32
    torch.testing.assert_close(changed, weight + low.B.float() @ low.A.float())
    torch.testing.assert_close(low.dense(), low.B.float() @ low.A.float())
    assert low.apply_to(weight.double()).dtype == torch.float64


def test_gain_multiplies_the_changed_weight() -> None:
    plain, gain, weight = random(), torch.rand(7) + 0.5, torch.randn(7, 9)
    low = LowRank(plain.A, plain.B, gain)
    torch.testing.assert_close(low.apply_to(weight), gain[:, None] * (weight + plain.B @ plain.A))
    assert low.truncate(2).gain is gain
    for refused in (low.dense, low.norm, low.singular_values, lambda: low.add(plain), lambda: plain.add(low),
                    lambda: low.scaled(0.5)):  # fmt: skip
        with pytest.raises(AdapterError, match=r"is not defined for a change with a gain.*apply_to"):
            refused()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"found A \[3, 9\], B \[7, 2\]; needed A \[rank, in\]"):
        LowRank(torch.zeros(3, 9), torch.zeros(7, 2))
    with pytest.raises(AdapterError, match=r"gain \[6\]"):
        LowRank(torch.zeros(3, 9), torch.zeros(7, 3), torch.ones(6))
    with pytest.raises(AdapterError, match=r"rank of at least 1"):
        LowRank(torch.zeros(0, 9), torch.zeros(7, 0))
    with pytest.raises(AdapterError, match=r"different layers: found \[out, in\] = \[7, 9\] and \[9, 7\]"):
        random().add(random(9, 7))
    with pytest.raises(AdapterError, match=r"does not fit a weight of \[9, 7\]"):
        random().apply_to(torch.zeros(9, 7))
    with pytest.raises(AdapterError, match="cannot truncate to rank 0"):
        random().truncate(0)


def test_no_entry_exceeds_the_bound() -> None:
    low = random(7, 5, 3)
    assert float(low.dense().abs().max()) <= low.bound()
    assert math.isnan(LowRank(low.A, low.B * float("nan")).bound())
