"""rows: plans that group rows by what acts on them, and tensors split and joined without a row out of place."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sideroad.attaching import attach
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.rows import Plan, Segments

LAYER = nn.Linear(3, 5)
CHOICES: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}, {"c": 2.0}]
A, B, C, NONE = {"a": 1.0}, {"b": 1.0}, {"c": 2.0}, dict[str, float]()


def acting(plan: Plan, keys: str, each: int) -> list[dict[str, float]]:
    """What must act on each row that a layer with those keys sees."""
    rows = [{key: weight for key, weight in row.items() if key in keys} for row in plan.rows]
    return [row for row in rows for _ in range(each)]


def numbered(size: int) -> Tensor:
    return torch.arange(size)[:, None] * 10 + torch.arange(3)


@given(rows=st.lists(st.sampled_from(CHOICES), min_size=1, max_size=9), keys=st.sampled_from(["", "a", "ab", "abc"]),
       copies=st.integers(1, 3), repeated=st.booleans())  # fmt: skip
def test_every_row_is_in_the_segment_of_its_choice(
    rows: list[dict[str, float]], keys: str, copies: int, repeated: bool
) -> None:
    plan = Plan(rows, copies)
    each = copies if repeated else 1
    expected = acting(plan, keys, each)
    x = numbered(len(expected))
    segments = plan.segments(LAYER, x, keys)
    parts = segments.split(x)
    for weights, part in zip(segments.weights, parts, strict=True):
        assert all(expected[row] == weights for row in (part[:, 0] // 10).tolist())
    assert torch.equal(segments.join(parts), x)
    live = [tuple(sorted(weights.items())) for weights in segments.weights if weights]
    assert len(live) == len(set(live)), "one segment, and so one pass, a choice"


@pytest.mark.parametrize(
    ("rows", "keys", "weights", "sizes"),
    [
        ([A, A, A], "ab", (A,), (3,)),
        ([A, A, B], "ab", (A, B), (2, 1)),
        ([NONE, A, NONE, B], "ab", (NONE, A, NONE, B), (1, 1, 1, 1)),
        ([A, C, C, B], "ab", (A, NONE, B), (1, 2, 1)),
        ([{**A, **C}, A, C], "a", (A, NONE), (2, 1)),
    ],
)
def test_rows_that_lie_together_are_views(rows: Any, keys: str, weights: Any, sizes: Any) -> None:
    x = numbered(len(rows))
    segments = Plan(rows).segments(LAYER, x, keys)
    assert segments == Segments(sizes, weights, tuple((run,) for run in range(len(sizes))))
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in segments.split(x))


def test_rows_that_lie_apart_are_sorted_by_first_appearance() -> None:
    segments = Plan([B, A, NONE, B, A], copies=2).segments(LAYER, numbered(10), "ab")
    assert segments == Segments((2, 2, 2, 2, 2), (B, A, NONE), ((0, 3), (1, 4), (2,)))
    parts = segments.split(numbered(10))
    assert [part[:, 0].tolist() for part in parts] == [[0, 10, 60, 70], [20, 30, 80, 90], [40, 50]]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 3), (7, 1)])
def test_only_dim_0_is_looked_at(shape: tuple[int, ...]) -> None:
    x = torch.arange(3 * max(1, torch.Size(shape).numel())).reshape(3, *shape)
    segments = Plan([A, B, A]).segments(LAYER, x, "ab")
    first, second = segments.split(x)
    assert torch.equal(first, x[[0, 2]])
    assert torch.equal(second, x[[1]])
    assert torch.equal(segments.join([first, second]), x)


def test_a_plan_is_made_once() -> None:
    plan = Plan([A, B, A])
    x = numbered(3)
    assert plan.segments(LAYER, x, "ab") is plan.segments(nn.Linear(2, 2), x[:, :1].float(), {"b": 1, "a": 2, "z": 3})
    assert plan.segments(LAYER, x, "ab") is not plan.segments(LAYER, x, "a")


def test_a_plan_made_under_inference_mode_can_be_trained_with() -> None:
    plan = Plan([A, B, A])
    with torch.inference_mode():
        plan.segments(LAYER, torch.zeros(3, 2), "ab")
    x = torch.zeros(3, 2, requires_grad=True)
    segments = plan.segments(LAYER, x, "ab")
    segments.join([part * factor for part, factor in zip(segments.split(x), (2, 3), strict=True)]).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [2, 3, 2]


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (4, 3), (0, 3), ()])
def test_another_number_of_rows_is_refused(shape: tuple[int, ...]) -> None:
    words = "rows() named 2 rows, but an input of Linear(in_features=3, out_features=5, bias=True) is "
    with pytest.raises(AdapterError, match=re.escape(f"{words}{list(shape)};")):
        Plan([A, A]).segments(LAYER, torch.zeros(shape), "a")


def test_the_refusal_names_both_sizes() -> None:
    plan = Plan([A, A], copies=3)
    for size in (2, 6):
        plan.segments(LAYER, numbered(size), "a")
    with pytest.raises(AdapterError, match=r"dim 0 must be the batch: 2, or 6 with copies=3. Name every row"):
        plan.segments(LAYER, numbered(4), "a")
    assert plan.segments(LAYER, numbered(4), "b").weights == ({},)


def test_empty_plans_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"rows\(\) got an empty list; name adapters for every row"):
        Plan([])
    with pytest.raises(AdapterError, match=r"rows\(\) got copies=0; it must be at least 1"):
        Plan([A], copies=0)


def test_a_plan_without_an_adapter_and_a_copied_plan() -> None:
    plan = Plan([{**A, **B}, A, NONE], copies=2)
    assert (plan.without("a").rows, plan.without("a").copies) == ((B, NONE, NONE), 2)
    plan.segments(LAYER, numbered(3), "ab")
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other.rows == plan.rows
        assert other.segments(LAYER, numbered(6), "ab").runs == (2, 2, 2)


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)])
def test_models_with_the_sequence_in_dim_0_are_refused(layer: nn.Module) -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "odd": layer})
    handle = attach(model, AdapterConfig(targets="up"))
    words = r"needs the batch in dim 0, but odd \(.*batch_first=True"
    with pytest.raises(AdapterError, match=words), handle.rows([None]):
        pass
    layer.batch_first = True  # type: ignore[assignment]
    with handle.rows(["default", None]):
        assert model["up"](torch.zeros(2, 8)).shape == (2, 8)
