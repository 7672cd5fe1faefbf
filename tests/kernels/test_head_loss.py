"""Head and cross-entropy in one: equal to the plain ones, in chunks of any size, with any finish of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sideroad.kernels import head_loss as module
from sideroad.kernels.head_loss import Finish, head_loss
from sideroad.kernels.pieces import EAGER
from sideroad.kernels.predictions import Predictions
from sideroad.kernels.products import Pair, Projection

ROWS, WIDTH, VOCABULARY, RANK = 37, 12, 29, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    first = torch.randint(VOCABULARY, (1, ROWS), generator=torch.Generator().manual_seed(1))
    first[0, ::3] = -100
    return first, (torch.tensor([5, 1, 5, 30]), torch.tensor([2, 3, 2, 28]))


@pytest.mark.parametrize("finish", [Finish(), Finish(scale=0.25), Finish(cap=3.0), Finish(scale=2.0, cap=5.0)])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [4, 128])
def test_equals_plain_logits_and_loss(
    monkeypatch: pytest.MonkeyPatch, finish: Finish, adapted: bool, biased: bool, rows: int
) -> None:
    monkeypatch.setattr(module, "FEWEST_ROWS", rows)
    monkeypatch.setattr(module, "MOST_ROWS", rows)
    hidden, weight = draw(ROWS, WIDTH).requires_grad_(), draw(VOCABULARY, WIDTH, seed=2)
    bias = draw(VOCABULARY, seed=3) if biased else None
    A, B = draw(RANK, WIDTH, seed=4).requires_grad_(), draw(VOCABULARY, RANK, seed=5).requires_grad_()
    pair = Pair(A, B, 0.7) if adapted else None
    first, extra = targets()
    predictions = Predictions.of(first, extra)
    trained = [hidden, A, B] if adapted else [hidden]

    found = head_loss(hidden[predictions.places], Projection(weight, bias, pair), finish, predictions, EAGER)
    logits = nn.functional.linear(hidden, weight + 0.7 * B @ A if adapted else weight, bias) * finish.scale
    if finish.cap is not None:
        logits = finish.cap * torch.tanh(logits / finish.cap)
    expected = cross_entropy(logits, first[0], ignore_index=-100, reduction="sum")
    expected = expected + cross_entropy(logits[extra[0]], extra[1], reduction="sum")

    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(3 * loss, trained) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_nothing_to_predict_is_zero_and_differentiable() -> None:
    hidden = draw(4, WIDTH).requires_grad_()
    predictions = Predictions.of(torch.full((1, 4), -100))
    head = Projection(draw(VOCABULARY, WIDTH), None)
    loss = head_loss(hidden[predictions.places], head, Finish(), predictions, EAGER)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_the_logits_never_exist_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_ROWS", 4)
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    seen: list[int] = []
    honest = module._Work.chunk
    monkeypatch.setattr(
        module._Work, "chunk", lambda self, rows, g: (seen.append(rows.stop - rows.start), honest(self, rows, g))[1]
    )
    predictions = Predictions.of(targets()[0])
    head = Projection(draw(VOCABULARY, WIDTH), None)
    head_loss(draw(len(predictions.places), WIDTH), head, Finish(), predictions, EAGER)
    assert max(seen) == 4
    assert sum(seen) == len(predictions.places)
