"""kinds/changed_weight: products with a changed weight that is never made, equal to those with the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, IDS, mixture
from tiny import fill
from torch import Tensor
from torch.nn import functional

from sideroad import seams
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.kinds.changed_weight import ChangedWeight, Pair, multiplies

EXPERTS, ROWS, COLUMNS = 3, 8, 12


def stack(rank: int = 2, pairs: int = 2, dtype: torch.dtype = torch.float64) -> ChangedWeight:
    torch.manual_seed(rank)
    made = [
        Pair(torch.randn(EXPERTS, ROWS, rank, dtype=dtype), torch.randn(EXPERTS, rank, COLUMNS, dtype=dtype), 0.5 + n)
        for n in range(pairs)
    ]
    return ChangedWeight(torch.randn(EXPERTS, ROWS, COLUMNS, dtype=dtype), made)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


USES: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda w: functional.linear(draw(5, COLUMNS), w[1]),
    "linear with bias": lambda w: functional.linear(draw(5, COLUMNS), w[torch.tensor(1)], draw(ROWS)),
    "x @ w": lambda w: draw(5, ROWS) @ w[2],
    "w @ x": lambda w: w[2] @ draw(COLUMNS, 5),
    "x @ all": lambda w: draw(EXPERTS, 5, ROWS) @ w,
    "matmul": lambda w: torch.matmul(draw(5, ROWS), w[0]),
    "bmm": lambda w: torch.bmm(draw(4, 1, ROWS), w[torch.tensor([0, 2, 2, 1])]),
    "bmm from the left": lambda w: torch.bmm(w[torch.tensor([0, 2, 2, 1])], draw(4, COLUMNS, 1)),
    "turned": lambda w: draw(5, COLUMNS) @ w.transpose(1, 2)[0],
    "turned, from behind": lambda w: draw(5, COLUMNS) @ w.transpose(-1, -2)[0],
    "einsum": lambda w: torch.einsum("eti,eio->eto", draw(EXPERTS, 5, ROWS), w),
    "other exchange": lambda w: w.transpose(0, 1),
    "slice": lambda w: w[:2],
    "sum": lambda w: w.sum(0),
    "list": lambda w: torch.stack([w[0], w[1]]),
}


@pytest.mark.parametrize("use", USES)
def test_it_acts_as_the_tensor_that_it_stands_for(use: str) -> None:
    changed = stack()
    found, expected = USES[use](changed), USES[use](changed.dense())
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use", list(USES)[:10])
def test_a_product_makes_no_matrix(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ChangedWeight) -> Tensor:
        raise AssertionError("the matrix was made")

    monkeypatch.setattr(ChangedWeight, "dense", refuse)
    USES[use](stack())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products_pad_the_rank(rank: int, turned: bool) -> None:
    changed = stack(rank, dtype=torch.float32)
    weight, width = (changed.transpose(-2, -1), COLUMNS) if turned else (changed, ROWS)
    x, offs = torch.randn(7, width), torch.tensor([3, 3, 7], dtype=torch.int32)
    found = functional.grouped_mm(x, weight, offs=offs)  # type: ignore[arg-type]
    dense = weight.dense()
    torch.testing.assert_close(found, torch.cat([x[:3] @ dense[0], x[3:] @ dense[2]]), rtol=1e-5, atol=1e-5)


def test_it_answers_for_the_weight_without_being_made() -> None:
    changed = stack()
    assert (changed.shape, changed.dtype, changed.ndim) == ((EXPERTS, ROWS, COLUMNS), torch.float64, 3)
    assert changed.device.type == "cpu"
    with pytest.raises(AttributeError):
        changed.other  # noqa: B018


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_products_equal_summed_weights_in_every_way_of_transformers(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(name).train()
    model.set_experts_implementation(way)
    config = AdapterConfig(targets=("gate_up_proj", "re:.*experts.down_proj"), method=LoraMethod(rank=3, alpha=6))
    handle = attach(model, config)
    fill(handle, size=0.2)
    attach(model, config, "second")
    fill(handle, "second", size=0.2)
    handle.activate({"default": 1.0, "second": -0.5})
    handle.set_trainable(["default", "second"])
    own = [*handle.parameters("default").values(), *handle.parameters("second").values()]

    def run() -> tuple[Tensor, list[Tensor]]:
        for parameter in own:
            parameter.grad = None
        out = model(IDS).logits
        out.square().mean().backward()
        return out.detach(), [parameter.grad for parameter in own if parameter.grad is not None]

    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert multiplies(experts)
    made = []
    monkeypatch.setattr(ChangedWeight, "dense", lambda self: made.append(self))
    found = run()
    assert not made
    monkeypatch.setattr(seams, "multiplies", lambda owner: False)
    expected = run()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert len(found[1]) == len(expected[1]) == len(own)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert ((mine - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_experts_of_an_unknown_kind_get_tensors() -> None:
    model = mixture("mixtral")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    model.config._experts_implementation = "sonicmoe"
    assert not multiplies(experts)
    assert not multiplies(torch.nn.Linear(2, 2))
