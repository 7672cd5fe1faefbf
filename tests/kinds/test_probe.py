"""kinds/probe: subclasses that compute something else than their class promises are not adapted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import fill
from torch import Tensor, nn
from torch.nn import functional

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import TargetError
from sideroad.kinds import keeps_its_promise


class Falcon(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        found = input @ self.weight.T
        return found if self.bias is None else found + self.bias


class Normed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Other(nn.Linear):
    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) + other


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Unscaled(nn.Embedding):
    embed_scale = 3.0


MAKERS = [lambda: Falcon(4, 3), lambda: Falcon(4, 3, bias=False), lambda: Scaled(5, 4), lambda: Unscaled(5, 4)]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_linear_in_its_weight_is_adapted(make: Callable[[], nn.Module]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert keeps_its_promise(make().to(dtype))
    model = nn.Sequential(make())
    handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=1)))
    fill(handle)
    x = torch.arange(4) if isinstance(model[0], nn.Embedding) else torch.randn(2, 4)
    apart = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), apart)


def test_what_is_not_is_refused() -> None:
    assert not keeps_its_promise(Normed(4, 3))
    with pytest.raises(TargetError, match=r"Normed .* which cannot be adapted"):
        attach(nn.Sequential(Normed(4, 3)), AdapterConfig(targets="0", method=LoraMethod(rank=1)))


def test_what_cannot_be_asked_is_believed() -> None:
    assert keeps_its_promise(Other(4, 3))
    assert keeps_its_promise(Normed(4, 3, device="meta"))
    assert keeps_its_promise(nn.LayerNorm(4))


def test_asking_draws_no_random_numbers() -> None:
    layer = Falcon(4, 3)
    before = torch.get_rng_state()
    keeps_its_promise(layer)
    assert torch.equal(torch.get_rng_state(), before)
