"""kinds/embedding: looked-up pairs, gradients of the tokens seen alone, scaled embeddings, whole tokens dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fill, tiny_llama
from torch import Tensor, nn
from torch.nn import functional

from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import TargetError
from sideroad.kinds import kind_of
from sideroad.kinds.embedding import Embedding

IDS = torch.tensor([[1, 4, 4], [7, 1, 0]])


class Scaled(nn.Embedding):
    """As in Gemma: a factor in the forward."""

    def __init__(self, *args: Any, scale: float = 3.0, as_tensor: bool = False) -> None:
        super().__init__(*args)
        self.embed_scale: Any = torch.tensor(scale) if as_tensor else scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    """As learned positions: a forward of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


def adapted(layer: nn.Module, **method: Any) -> tuple[nn.Module, Attached]:
    model = nn.Sequential(layer)
    handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=2, alpha=6, **method)), seed=0)
    fill(handle, size=1.0)
    return model, handle


@pytest.mark.parametrize("make", [nn.Embedding, Scaled, lambda *a: Scaled(*a, as_tensor=True)])
def test_branch_equals_the_changed_table(make: Any) -> None:
    model, handle = adapted(make(9, 5))
    layer, (A, B) = model[0], handle.parameters("default").values()
    assert (tuple(A.shape), tuple(B.shape)) == ((2, 9), (5, 2))
    changed = layer.weight + 3.0 * (B @ A).t()
    scale = getattr(layer, "embed_scale", 1.0)
    torch.testing.assert_close(model(IDS), functional.embedding(IDS, changed) * scale)
    apart = model(IDS)
    with handle.merged():
        torch.testing.assert_close(layer.weight, changed)
        torch.testing.assert_close(model(IDS), apart)
    assert model(IDS.int()).equal(apart)


def test_starts_as_the_base_with_a_zero_and_b_normal() -> None:
    model = nn.Sequential(nn.Embedding(400, 60))
    before = model(IDS)
    handle = attach(model, AdapterConfig(targets="0"), seed=0)
    A, B = handle.parameters("default").values()
    assert not A.any()
    assert abs(float(B.detach().std()) - 1) < 0.1
    assert torch.equal(model(IDS), before)


def test_only_columns_of_tokens_seen_get_gradients_and_the_padding_row_none() -> None:
    model, handle = adapted(nn.Embedding(9, 5, padding_idx=4))
    model(IDS).square().sum().backward()
    A, B = handle.parameters("default").values()
    assert A.grad is not None
    assert B.grad is not None
    moved = A.grad.abs().sum(0).nonzero().flatten().tolist()
    assert moved == [0, 1, 7]
    assert B.grad.any()
    plain = nn.Embedding(9, 5, padding_idx=4)
    plain(IDS).square().sum().backward()
    assert plain.weight.grad is not None
    assert plain.weight.grad.abs().sum(1).nonzero().flatten().tolist() == moved


def test_dropout_drops_whole_tokens_and_keeps_the_expectation() -> None:
    model, handle = adapted(nn.Embedding(9, 5), dropout=0.25)
    model.eval()
    ids = torch.full((4000,), 3)
    plain, with_branch = model[0].weight[3], model(ids)[0]
    model.train()
    torch.manual_seed(0)
    change = (model(ids) - plain) / (with_branch - plain)
    kept = change[:, 0] > 0.5
    torch.testing.assert_close(change[kept], torch.full_like(change[kept], 1 / 0.75), rtol=1e-4, atol=1e-4)
    assert change[~kept].abs().max() < 1e-5
    assert abs(float(kept.float().mean()) - 0.75) < 0.03
    assert change.mean().item() == pytest.approx(1.0, abs=0.04)
    handle.model.eval()
    assert torch.equal(model(ids)[0], with_branch)


@pytest.mark.parametrize("layer", [nn.Embedding(9, 5, max_norm=1.0), Shifted(9, 5)])
def test_tables_that_rewrite_themselves_or_shift_their_ids_are_refused(layer: nn.Module) -> None:
    assert kind_of(layer) is None
    with pytest.raises(TargetError, match=r'target "0" means (Embedding|Shifted) \(0\) .* cannot be adapted'):
        attach(nn.Sequential(layer), AdapterConfig(targets="0"))


def test_all_linear_leaves_embeddings_alone() -> None:
    handle = attach(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 5)), AdapterConfig(method=LoraMethod(rank=2)))
    assert handle.paths("default") == ("1",)
    assert not Embedding().linear


def test_autocast_leaves_a_lookup_in_its_own_type() -> None:
    """Step 0 under autocast is the base, bit for bit: nothing of it is computed in 16 bits."""
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS).logits
        handle = attach(model, AdapterConfig(targets="embed_tokens"), seed=0)
        assert torch.equal(model(IDS).logits, expected)
        fill(handle)
        looked_up = model.model.embed_tokens(IDS)
    assert looked_up.dtype == torch.float32
    assert torch.equal(looked_up, model.model.embed_tokens(IDS))


def test_dropout_draws_for_every_token_of_every_row() -> None:
    _, kept = Embedding().dropped(torch.zeros(64, 32, dtype=torch.long), 0.5)
    assert isinstance(kept, Tensor)
    assert len(kept.flatten(1).unique(dim=0)) > 32
