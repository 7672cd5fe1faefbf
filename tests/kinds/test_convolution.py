"""kinds/convolution: the branch has the base's geometry, so it equals the convolution of the changed weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fill
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import MergeError, TargetError
from sideroad.kinds import kind_of

CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (nn.Conv2d, {}),
    "stride": (nn.Conv2d, {"stride": 2, "padding": 1}),
    "dilation": (nn.Conv2d, {"dilation": 2}),
    "same": (nn.Conv2d, {"padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, {"padding": "valid"}),
    "uneven": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}),
    "reflect": (nn.Conv2d, {"padding_mode": "reflect", "padding": 1}),
    "circular": (nn.Conv2d, {"padding_mode": "circular", "padding": (1, 2)}),
    "replicate": (nn.Conv2d, {"padding_mode": "replicate", "padding": "same"}),
    "groups": (nn.Conv2d, {"groups": 2, "stride": 2, "padding": 1}),
    "groups reflect": (nn.Conv2d, {"groups": 2, "padding": 1, "padding_mode": "reflect", "dilation": 2}),
    "depthwise": (nn.Conv2d, {"groups": 4, "out_channels": 8}),
    "no bias": (nn.Conv2d, {"bias": False}),
    "1d": (nn.Conv1d, {"stride": 2, "padding": 1}),
    "1d dilated circular": (nn.Conv1d, {"dilation": 2, "padding": 2, "padding_mode": "circular"}),
    "1d depthwise": (nn.Conv1d, {"groups": 4, "out_channels": 4}),
    "3d": (nn.Conv3d, {"stride": (1, 2, 1), "padding": 1}),
    "3d groups replicate": (nn.Conv3d, {"groups": 2, "padding": 1, "padding_mode": "replicate"}),
}


def adapted(make: type[nn.Module], fields: dict[str, Any]) -> tuple[Any, Attached, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(make(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **fields}))
    rank = 1 if fields.get("groups") == 4 else 2
    handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=rank, alpha=3)), seed=0)
    fill(handle, size=0.5)
    places = {nn.Conv1d: (9,), nn.Conv2d: (9, 8), nn.Conv3d: (5, 6, 7)}[make]  # type: ignore[index]
    return model, handle, torch.randn(2, 4, *places)


def changed_weight(layer: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + s·B A, group by group, from the definition."""
    groups, rank = layer.groups, B.shape[1]
    inner, outer = A.flatten(1).split(rank), B.flatten(1).split(layer.out_channels // groups)
    product = torch.cat([b @ a for a, b in zip(inner, outer, strict=True)])
    return layer.weight + scale * product.reshape(layer.weight.shape)


@pytest.mark.parametrize(("make", "fields"), CASES.values(), ids=CASES)
def test_base_and_branch_are_the_convolution_of_the_changed_weight(make: type[nn.Module], fields: Any) -> None:
    model, handle, x = adapted(make, fields)
    layer, (A, B) = model[0], handle.parameters("default").values()
    with torch.no_grad():
        weight = changed_weight(layer, A, B, 3 / B.shape[1])
    apart = model(x)
    base = layer._conv_forward(x, weight, layer.bias)
    torch.testing.assert_close(apart, base, rtol=1e-5, atol=1e-5)
    # one picture without a batch dimension
    torch.testing.assert_close(model(x[0]), apart[0], rtol=1e-5, atol=1e-5)
    with handle.merged():
        torch.testing.assert_close(layer.weight, weight)
        torch.testing.assert_close(model(x), apart, rtol=1e-5, atol=1e-5)


def test_shapes_are_peft_s_without_groups_and_a_pair_for_each_group_with_them() -> None:
    _, handle, _ = adapted(nn.Conv2d, {"kernel_size": (3, 2)})
    assert [tuple(one.shape) for one in handle.parameters("default").values()] == [(2, 4, 3, 2), (6, 2, 1, 1)]
    _, handle, _ = adapted(nn.Conv2d, {"groups": 2})
    assert [tuple(one.shape) for one in handle.parameters("default").values()] == [(4, 2, 3, 3), (6, 2, 1, 1)]
    assert handle.adapter("default").ranks == {"0": 2}
    assert handle.adapter("default").scale("0") == 1.5


@pytest.mark.parametrize("each", [2, 4], ids=["today's", "old"])
def test_peft_s_pair_on_groups_sees_all_inputs_acts_and_does_not_merge(each: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1)), torch.randn(2, 4, 7, 7)
    base = model(x)
    A, B = torch.randn(4, 4, 3, 3), torch.randn(6, each, 1, 1)
    config = AdapterConfig(targets="0", method=LoraMethod(rank=4, alpha=12))
    handle = attach(model, Adapter(config, {"0": {"A": A, "B": B}}))
    low = nn.functional.conv2d(x, A, stride=2, padding=1)
    torch.testing.assert_close(model(x), base + 3.0 * nn.functional.conv2d(low, B, groups=4 // each))
    with pytest.raises(MergeError, match=r"on a Conv2d with groups=2 is of PEFT's form, which reaches across"):
        handle.merge()


def test_start_is_peft_s_and_the_model_stays_the_base() -> None:
    layer = nn.Conv2d(8, 6, 5)
    model, x = nn.Sequential(layer), torch.randn(1, 8, 6, 6)
    before = model(x)
    A, B = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=4)), seed=0).parameters("default").values()
    assert torch.equal(model(x), before)
    bound = 1 / (8 * 25) ** 0.5
    assert 0.9 * bound < A.abs().max() <= bound
    assert not B.any()


def test_trained_bias_is_one_value_a_channel() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 5, 5)
    before = model(x)
    handle = attach(model, AdapterConfig(targets="0", bias="adapted", method=LoraMethod(rank=1)), seed=0)
    with torch.no_grad():
        handle.parameters("default")["0.bias"] += torch.arange(6.0)
    apart = model(x)
    torch.testing.assert_close(apart, before + torch.arange(6.0)[:, None, None])
    with handle.merged():
        torch.testing.assert_close(model(x), apart)


def test_dropout_acts_on_the_branch_alone_and_only_in_training() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=2, dropout=0.5)), seed=0)
    x = torch.randn(2, 4, 9)
    assert torch.equal(model.train()(x), model.eval()(x))
    fill(handle)
    assert not torch.equal(model.train()(x), model.eval()(x))
    assert torch.equal(model(x), model(x))


class Standardised(nn.Conv2d):
    """A subclass whose weight is not the one that acts."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize("layer", [Standardised(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)])
def test_convolutions_with_a_forward_of_their_own_are_refused(layer: nn.Module) -> None:
    assert kind_of(layer) is None
    with pytest.raises(TargetError, match=f"{type(layer).__name__}.*cannot be adapted"):
        attach(nn.Sequential(layer), AdapterConfig(targets="0"))


def test_a_rank_beyond_one_group_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(TargetError, match=r"rank 2 is larger than 0 .* the largest rank there is 1"):
        attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=2)))
