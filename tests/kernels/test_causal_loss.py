"""The loss of a packed row equals the sum over its sequences, in value and gradient, on every architecture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import recompute_activations
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from zoo import VOCABULARY, ZOO, bloom, gemma2, llama, qwen2

from sideroad.kernels.causal_loss import causal_loss, forward_logits
from sideroad.kernels.isolation import choose_route, packing

LENGTHS = (6, 1, 13, 4)
PACKABLE = [name for name in ZOO if name not in ("bloom", "mamba", "gpt_oss")]
BY_MASK = [name for name in PACKABLE if name != "opt"]  # transformers' OPT builds its mask without looking at positions


def sequences() -> list[tuple[Tensor, Tensor]]:
    """Ids [length] and shifted targets [length] of four sequences, about half of the tokens trained."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        targets = torch.cat((ids[1:], torch.tensor([-100])))
        targets[: length // 2] = -100
        found.append((ids, targets))
    return found


def pack() -> tuple[Tensor, Tensor, Tensor]:
    ids, targets = (torch.cat(parts)[None] for parts in zip(*sequences(), strict=True))
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None], targets


def pad() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest = max(LENGTHS)
    ids, targets = torch.zeros(4, longest, dtype=torch.long), torch.full((4, longest), -100)
    mask = torch.zeros(4, longest, dtype=torch.long)
    for row, (these, wanted) in enumerate(sequences()):
        ids[row, : len(these)], targets[row, : len(these)], mask[row, : len(these)] = these, wanted, 1
    return ids, torch.arange(longest).expand(4, -1), mask, targets


def exact(model: nn.Module) -> tuple[float, list[Tensor], int]:
    """Each sequence alone through the unmodified model, the loss taken in fp64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, targets in sequences():
        logits = model(input_ids=ids[None]).logits[0].double()
        total = total + cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    return total.item(), list(torch.autograd.grad(total, trained(model))), count


def trained(model: nn.Module) -> list[nn.Parameter]:
    matrices = {name: p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 2}
    return [p for name, p in matrices.items() if not any(part in name for part in ("embed", "wpe", "wte"))]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    off = sum((a - b).double().square().sum() for a, b in zip(found, expected, strict=True))
    return float((off / sum(b.double().square().sum() for b in expected)).sqrt())


@pytest.fixture
def counted_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    from sideroad.kernels import causal_loss as module

    plain = module.cross_entropy_sum
    monkeypatch.setattr(module, "cross_entropy_sum", lambda z, t: (seen.append(len(z)), plain(z, t))[1])
    return seen


@pytest.mark.parametrize(
    ("name", "replace"), [*((name, True) for name in PACKABLE), *((name, False) for name in BY_MASK)]
)
def test_packed_equals_separate(name: str, replace: bool) -> None:
    model = ZOO[name]()
    value, gradients, count = exact(model)
    ids, positions, targets = pack()
    with packing(model, choose_route(model)) if replace else nullcontext():
        loss, counted = causal_loss(model, ids, positions, None, targets, LENGTHS)
        found = torch.autograd.grad(loss, trained(model))
    assert counted == count
    assert abs(loss.item() / value - 1) < 2e-5
    assert distance(found, gradients) < 2e-5


@pytest.mark.parametrize("name", list(ZOO))
def test_padded_equals_separate(name: str) -> None:
    model = ZOO[name]()
    value, gradients, count = exact(model)
    ids, positions, mask, targets = pad()
    loss, counted = causal_loss(model, ids, positions, mask, targets, None)
    found = torch.autograd.grad(loss, trained(model))
    assert counted == count
    assert abs(loss.item() / value - 1) < 2e-5
    assert distance(found, gradients) < 2e-5


def test_gradient_checkpointing_repeats_the_segments_in_backward() -> None:
    model = llama()
    value, gradients, _ = exact(model)
    ids, positions, targets = pack()
    recompute_activations(model)
    model.train()
    with packing(model, choose_route(model)):
        loss, _ = causal_loss(model, ids, positions, None, targets, LENGTHS)
        found = torch.autograd.grad(loss, trained(model))
    assert abs(loss.item() / value - 1) < 2e-5
    assert distance(found, gradients) < 2e-5


def test_a_cache_by_default_does_not_undo_the_isolation() -> None:
    """transformers ignores restarting positions when a cache is used, which its configurations ask for."""
    model = llama()
    assert model.config.use_cache
    value, _, _ = exact(model)
    ids, positions, targets = pack()
    loss, _ = causal_loss(model, ids, positions, None, targets, LENGTHS)
    assert abs(loss.item() / value - 1) < 2e-5


def test_logits_are_computed_only_where_a_token_is_predicted(counted_logits: list[int]) -> None:
    model, widths = llama(), []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    ids, positions, targets = pack()
    causal_loss(model, ids, positions, None, targets, LENGTHS)
    wanted = int((targets != -100).sum())
    assert (widths, counted_logits) == ([wanted], [wanted])
    ids, positions, mask, targets = pad()
    causal_loss(model, ids, positions, mask, targets, None)
    assert widths[-1] == int((targets != -100).any(0).sum())


def test_soft_cap_and_a_changed_head_are_kept() -> None:
    model = gemma2()
    ids, positions, targets = pack()
    model.lm_head.register_forward_hook(lambda _m, _i, output: output * 2)
    value, _, _ = exact(model)
    loss, _ = causal_loss(model, ids, positions, None, targets, LENGTHS)
    assert abs(loss.item() / value - 1) < 2e-5


def test_nothing_to_predict_is_zero_and_differentiable() -> None:
    model = qwen2()
    ids, positions, targets = pack()
    loss, count = causal_loss(model, ids, positions, None, torch.full_like(targets, -100), LENGTHS)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


class WithoutChoice(nn.Module):
    """A causal model whose forward computes every logit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Any:
        return self.inner(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache
        )


def test_a_model_that_cannot_choose_positions_computes_all() -> None:
    model = WithoutChoice()
    ids, positions, targets = pack()
    loss, count = causal_loss(model, ids, positions, None, targets, LENGTHS)
    expected, expected_count = causal_loss(model.inner, ids, positions, None, targets, LENGTHS)
    assert count == expected_count
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_half_precision_logits_give_an_fp32_sum() -> None:
    model = llama().bfloat16()
    ids, positions, targets = pack()
    with packing(model, choose_route(model)):
        loss, _ = causal_loss(model, ids, positions, None, targets, LENGTHS)
    assert loss.dtype == torch.float32
    value, _, _ = exact(model)
    assert loss.item() == pytest.approx(value, rel=2e-2)


def test_positions_are_not_forced_on_a_model_without_them() -> None:
    model = bloom()
    ids, positions, mask, _ = pad()
    with torch.no_grad():
        logits = forward_logits(model, ids, positions, mask, None)
    assert logits.shape == (4, max(LENGTHS), VOCABULARY)
