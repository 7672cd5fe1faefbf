"""AdaLoRA's budget: schedule, scores worked by hand, pruning that is exact, and a regulariser equal to autograd's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from sideroad.attaching import attach
from sideroad.config import AdaloraMethod, AdapterConfig
from sideroad.methods.adalora import AdaloraDelta
from sideroad.methods.budget import Budget, budget_for


def budget(steps: int = 100, **numbers: float) -> tuple[nn.Module, Budget]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    method = AdaloraMethod(**{"rank": 4, "target_rank": 2, "warmup": 0.1, "final": 0.3, "every": 10, **numbers})
    handle = attach(model, AdapterConfig(method=method), seed=0)
    made = budget_for(handle.deltas("default"), method, steps)
    assert made is not None
    return model, made


def triplets(made: Budget) -> dict[str, AdaloraDelta]:
    return made._deltas


def test_the_schedule_is_cubic_between_its_ends() -> None:
    _, made = budget(rank=5, target_rank=1)
    sizes = [made.size(step) for step in range(1, 101)]
    assert sizes[9] == 10
    assert sizes[69] == sizes[-1] == 2
    assert all(a >= b for a, b in pairwise(sizes))
    assert made.size(40) == 2 + int(8 * 0.5**3)


def test_scores_are_those_worked_by_hand() -> None:
    _, made = budget()
    delta = triplets(made)["0"]
    with torch.no_grad():
        for part, value, gradient in (("A", 2.0, 0.5), ("B", 3.0, 0.1), ("E", 4.0, 0.25)):
            getattr(delta, part).fill_(value).grad = torch.full_like(getattr(delta, part), gradient)
    made.observe()
    # I = |w g|; smoothed 0.15 I; |I - smoothed| = 0.85 I; uncertainty 0.15 * 0.85 I; score their product
    product = 0.15 * 0.15 * 0.85
    assert made.importance()["0"].tolist() == pytest.approx([product * (1.0**2 + 1.0**2 + 0.3**2)] * 4, rel=1e-5)
    assert made.importance()["1"].tolist() == [0.0] * 4
    made.observe()
    smoothed = 0.85 * 0.15 + 0.15
    uncertain = 0.85 * 0.15 * 0.85 + 0.15 * (1 - smoothed)
    assert float(made.importance()["0"][0]) == pytest.approx(smoothed * uncertain * 2.09, rel=1e-5)


def test_pruning_leaves_exactly_the_budget_and_equal_scores_do_not_take_more() -> None:
    _, made = budget()
    with torch.no_grad():
        for delta in triplets(made).values():
            delta.E.fill_(1.0)
    made.prune(20)
    alive = sum(int((delta.E != 0).sum()) for delta in triplets(made).values())
    assert alive == made.size(20)
    with torch.no_grad():
        for delta in triplets(made).values():
            delta.E.fill_(1.0)
    made.prune(21)
    assert all(bool((delta.E == 1).all()) for delta in triplets(made).values())
    made.prune(75)
    kept = {path: (delta.E != 0).clone() for path, delta in triplets(made).items()}
    assert sum(int(one.sum()) for one in kept.values()) == 4
    with torch.no_grad():
        for delta in triplets(made).values():
            delta.E.fill_(2.0)
            delta.E.grad = torch.rand_like(delta.E)
    made.observe()
    made.prune(76)
    assert all(torch.equal(delta.E != 0, kept[path]) for path, delta in triplets(made).items())


def test_the_regulariser_is_the_papers_averaged_over_the_matrices() -> None:
    _, made = budget(orthogonality=0.3)
    total = torch.zeros(())
    for delta in triplets(made).values():
        eye = torch.eye(4)
        total = total + (delta.B.t() @ delta.B - eye).square().sum() + (delta.A @ delta.A.t() - eye).square().sum()
    parameters = [one for delta in triplets(made).values() for one in (delta.A, delta.B)]
    expected = torch.autograd.grad(0.3 * total / len(parameters), parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    made.regularise()
    for parameter, one in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, one)


def test_its_state_comes_back() -> None:
    _, made = budget()
    for delta in triplets(made).values():
        for part in ("A", "B", "E"):
            getattr(delta, part).grad = torch.rand_like(getattr(delta, part))
    made.observe()
    made.prune(90)
    kept = made.state_tensors()
    assert set(kept) == set(made.names)
    _, other = budget()
    other.load_state(kept)
    assert all(torch.equal(one, other.state_tensors()[name]) for name, one in kept.items())
