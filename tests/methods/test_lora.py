"""methods/lora: the delta against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.methods.lora import BiasDelta, LoraDelta


def delta(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoraDelta:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 6), (4, 3)))
    return LoraDelta(A, B, scale=2.0, dropout=dropout)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (0, 6)])
def test_formula_for_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, one = nn.Linear(6, 4), delta()
    x = torch.randn(shape)
    y = layer(x)
    torch.testing.assert_close(one(x, y, layer, 0.5), y + 0.5 * 2.0 * (x @ one.A.t() @ one.B.t()))


def test_one_sgd_step_moves_only_b_and_as_the_paper_says() -> None:
    layer = nn.Linear(6, 4, bias=False)
    one = delta()
    nn.init.zeros_(one.B)
    before = one.A.detach().clone()
    x, rate = torch.randn(5, 6), 0.1
    y = layer(x).detach()
    (one(x, y, layer, 1.0) * torch.arange(4.0)).sum().backward()
    gradient = torch.arange(4.0).expand(5, 4).t() @ x
    torch.optim.SGD(one.parameters(), lr=rate).step()
    assert torch.equal(one.A, before)
    torch.testing.assert_close(one.B, -rate * 2.0 * gradient @ before.t())


def test_dropout_acts_on_the_branch_alone_and_only_in_training() -> None:
    layer, one = nn.Linear(6, 4), delta(dropout=0.5)
    x = torch.ones(64, 6)
    y = layer(x)
    branches = (one(x, y, layer, 1.0) - y).detach()
    assert len(branches.unique(dim=0)) > 4
    one.eval()
    assert len((one(x, y, layer, 1.0) - y).detach().unique(dim=0)) == 1
    torch.testing.assert_close(branches.mean(0), (one(x, y, layer, 1.0) - y)[0].detach(), rtol=0.6, atol=2.0)


def test_factors_are_cast_and_the_input_is_saved_once() -> None:
    layers = [nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False) for _ in range(3)]
    deltas = [LoraDelta(torch.randn(2, 64), torch.zeros(64, 2), scale=1.0) for _ in layers]
    x = torch.randn(1024, 64, dtype=torch.bfloat16)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer, one in zip(layers, deltas, strict=True):
            kept.append(one(x, layer(x), layer, 1.0))
    assert all(y.dtype == torch.bfloat16 for y in kept)
    assert sum(saved.values()) <= 1.15 * x.nbytes


def test_autocast() -> None:
    layer, one = nn.Linear(6, 4), delta()
    x = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = one(x, layer(x), layer, 1.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), one(x, layer(x), layer, 1.0), rtol=3e-2, atol=3e-1)


def test_lower_holds_the_scale() -> None:
    one = delta(dtype=torch.bfloat16)
    low = one.lower(nn.Linear(6, 4))
    assert low.A.dtype == torch.float32
    torch.testing.assert_close(low.dense(), 2.0 * one.B.float() @ one.A.float())
    assert not low.B.requires_grad


def test_bias_change_is_exactly_nothing_at_the_start() -> None:
    layer = nn.Linear(6, 4, dtype=torch.bfloat16)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    y = layer(x)
    one = BiasDelta(layer.bias.detach().float())
    assert torch.equal(one(x, y, layer, 1.0), y)
    with torch.no_grad():
        one.bias += 1.0
    torch.testing.assert_close(one(x, y, layer, 0.5), y + 0.5)
    assert one.lower(layer) is None


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.BatchNorm1d(4), (3, 4, 5)),
        (nn.BatchNorm2d(4), (3, 4, 5, 6)),
        (nn.BatchNorm3d(4), (2, 4, 3, 2, 5)),
        (nn.GroupNorm(2, 4), (3, 4, 4)),
        (nn.LayerNorm(4), (3, 5, 4)),
    ],
)
def test_a_norms_bias_acts_on_its_channels(norm: nn.Module, shape: tuple[int, ...]) -> None:
    one, x = BiasDelta(torch.arange(4.0)), torch.randn(shape)
    norm.eval()
    found = one(x, norm(x), norm, 1.0)
    norm.get_parameter("bias").data = torch.arange(4.0)
    torch.testing.assert_close(found, norm(x))


def test_the_bias_of_attentions_output_projection_is_trained_with_its_pair_or_alone() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True), "lin": nn.Linear(8, 8)})
    x = torch.randn(2, 3, 8)
    for config, count in (
        (AdapterConfig(targets=("mha", "out_proj"), bias="adapted", method=LoraMethod(rank=2)), 5),
        (AdapterConfig(targets="lin", bias="all", method=LoraMethod(rank=2)), 4),
    ):
        handle = attach(model, config, seed=0)
        plain = model["mha"](x, x, x)[0]
        with torch.no_grad():
            handle.parameters("default")["mha.out_proj.bias"] += 1.0
        assert len(handle.parameters("default")) == count
        found = model["mha"](x, x, x)[0]
        torch.testing.assert_close(found, plain + 1.0)
        found.sum().backward()
        grad = handle.parameters("default")["mha.out_proj.bias"].grad
        assert grad is not None
        torch.testing.assert_close(grad, torch.full((8,), 6.0))
        with handle.merged():
            torch.testing.assert_close(model["mha"](x, x, x)[0], found)
        handle.detach()
