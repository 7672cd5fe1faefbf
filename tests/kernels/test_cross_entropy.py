"""The summed cross-entropy: accurate, differentiable, indifferent to chunks, quiet about ignored rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from sideroad.kernels import cross_entropy as module
from sideroad.kernels.cross_entropy import IGNORED, cross_entropy_sum


def draw(rows: int, size: int, scale: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * scale
    return logits, torch.randint(size, (rows,), generator=generator)


def reference(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = logits.double().detach().requires_grad_()
    loss = cross_entropy(exact, targets, reduction="sum", ignore_index=IGNORED)
    return loss, torch.autograd.grad(loss, exact)[0]


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_value_and_gradient_equal_fp64(rows: int) -> None:
    logits, targets = draw(rows, 4099, scale=4.0)
    targets[::3] = IGNORED
    expected, expected_gradient = reference(logits, targets)
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, targets)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert (logits.grad - expected_gradient).norm() <= 1e-6 * max(expected_gradient.norm(), 1e-9)
    assert not logits.grad[::3].any()


def test_a_large_vocabulary_is_within_1e_5_of_fp64() -> None:
    logits, targets = draw(256, 49152, scale=3.0)
    logits += 20
    expected, expected_gradient = reference(logits, targets)
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, targets)
    loss.backward()
    assert logits.grad is not None
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    assert (logits.grad - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    logits, targets = draw(7, 11)
    targets[2] = IGNORED
    torch.autograd.gradcheck(lambda z: cross_entropy_sum(z, targets), logits.double().requires_grad_())


def test_chunks_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = draw(200, 50)
    gradients = []
    for rows in (1, 7, 128, 500):
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)
        leaf = logits.clone().requires_grad_()
        gradients.append(torch.autograd.grad(cross_entropy_sum(leaf, targets), leaf)[0])
    assert all(torch.equal(gradients[0], other) for other in gradients)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits, targets = draw(300, 4099, scale=4.0)
    half = logits.bfloat16()
    expected, expected_gradient = reference(half, targets)
    half.requires_grad_()
    loss = cross_entropy_sum(half, targets)
    loss.backward()
    assert half.grad is not None
    assert loss.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    assert (half.grad.double() - expected_gradient).norm() / expected_gradient.norm() < 4e-3


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_count_is_zero_not_nan(rows: int) -> None:
    logits = torch.randn(rows, 9, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((rows,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == (rows, 9)
    assert not logits.grad.any()


def test_ignored_rows_may_hold_anything_finite_or_extreme() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([IGNORED, 1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4 + torch.log(torch.tensor(3.0)).item())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_upstream_gradient_scales() -> None:
    logits, targets = draw(5, 7)
    logits.requires_grad_()
    (cross_entropy_sum(logits, targets) * 0.25).backward()
    _, expected = reference(logits, targets)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected * 0.25, rtol=1e-5, atol=1e-7)


def test_logits_survive_so_that_a_soft_cap_can_go_backward_twice() -> None:
    """tanh keeps its output for its own backward; a gradient written over it would be silently wrong."""
    inputs, targets = draw(6, 8)
    inputs.requires_grad_()
    capped = torch.tanh(inputs)
    before = capped.detach().clone()
    loss = cross_entropy_sum(capped, targets)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)[0]
    second = torch.autograd.grad(loss, inputs)[0]
    assert torch.equal(capped.detach(), before)
    assert torch.equal(first, second)


def test_only_the_logits_are_kept_for_backward() -> None:
    logits, targets = draw(64, 1000)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        cross_entropy_sum(logits.requires_grad_(), targets)
    large = {t.data_ptr() for t in kept if t.numel() >= logits.numel()}
    assert large == {logits.data_ptr()}
