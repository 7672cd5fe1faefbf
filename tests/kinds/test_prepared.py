"""kinds/prepared: convolution classes that prepare their input are adapted as what they compute, others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import fill
from torch import Tensor, nn
from torch.nn import functional

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, MergeError, TargetError
from sideroad.kinds import kind_of
from sideroad.kinds.prepared import PreparedConvolution, asked
from sideroad.peft_keys import PEFT_CONVOLUTION
from sideroad.survey import Survey


class Same(nn.Conv2d):
    """TensorFlow's "same" padding by the size of the input, which is uneven."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            more = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [more // 2, more - more // 2]
        x = functional.pad(x, pads) if any(pads) else x
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(nn.Conv2d):
    """The same with a module of its own, as EfficientNet-Lite has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(
            self.static_padding(x), weight=self.weight, bias=self.bias, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Normed(nn.Conv1d):
    """Prepares its input by a norm of its own, which counts its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(self.in_channels)
        self.register_buffer("shift", torch.full((1, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x) + self.shift)


class Plain(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


CASES: dict[str, Callable[[], nn.Module]] = {
    "same": lambda: Same(4, 6, 3, stride=2),
    "same dilated": lambda: Same(4, 6, (3, 2), dilation=(2, 1), stride=(1, 2)),
    "same grouped": lambda: Same(4, 6, 3, groups=2, stride=2),
    "same depthwise": lambda: Same(4, 8, 5, groups=4, bias=False),
    "padded": lambda: Padded(4, 6, 3, stride=2),
    "causal": lambda: Causal(4, 6, 3, dilation=2),
    "causal depthwise": lambda: Causal(4, 4, 3, groups=4),
    "normed": lambda: Normed(4, 6, 3, padding=1, padding_mode="circular"),
    "plain": lambda: Plain(4, 6, 3, padding=1, padding_mode="reflect"),
}


def adapted(make: Callable[[], nn.Module], **fields: Any) -> tuple[Any, Attached, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    rank = 1 if model[0].groups == 4 else 2
    handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=rank, alpha=3), **fields), seed=0)
    fill(handle, size=0.5)
    return model, handle, torch.randn(2, 4, *(9, 8)[: model[0].weight.ndim - 2])


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_merged_equals_unmerged(make: Callable[[], nn.Module]) -> None:
    model, handle, x = adapted(make)
    assert type(kind_of(model[0])) is PreparedConvolution
    with handle.disabled():
        base = model(x)
    apart = model(x)
    assert (apart - base).abs().max() > 0.1
    with handle.merged():
        torch.testing.assert_close(model(x), apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), apart)
    torch.testing.assert_close(model(x[0]) if model[0].weight.ndim == 4 else model(x)[0], apart[0])
    handle.detach()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_merged_weight(make: Callable[[], nn.Module]) -> None:
    model, handle, x = adapted(make)
    A, B = handle.parameters("default").values()
    draw = torch.randn(model(x).shape)
    (model(x) * draw).sum().backward()
    layer, groups = copy.deepcopy(model[0]), model[0].groups
    handle.detach()
    layer = copy.deepcopy(model[0])
    weight = layer.weight.detach()
    one, two = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    inner, outer = one.flatten(1).chunk(groups), two.flatten(1).chunk(groups)
    change = torch.cat([b @ a for a, b in zip(inner, outer, strict=True)]).reshape(weight.shape)
    del layer.weight
    layer.weight = weight + 3 / B.shape[1] * change
    (layer(x) * draw).sum().backward()
    torch.testing.assert_close(A.grad, one.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B.grad, two.grad, rtol=1e-4, atol=1e-4)


def test_a_trained_bias_counts_once() -> None:
    model, handle, x = adapted(CASES["same"], bias="adapted")
    apart = model(x)
    with handle.merged():
        torch.testing.assert_close(model(x), apart, rtol=1e-5, atol=1e-5)


def test_it_is_compiled_whole() -> None:
    for bias in ("none", "adapted"):
        model, _, x = adapted(CASES["same"], bias=bias)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


class Standardised(Same):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Scaled(Same):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Twice(Same):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return super().forward(x)


class Streaming(Causal):
    """What it puts in front is not in its input alone."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if before is None else torch.cat([before, x], -1))


class OtherBias(Same):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, torch.ones(self.out_channels), self.stride)


class Dependent(Same):
    """Looks at values, which are not there when it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.abs().max() if x.abs().max() > 1 else x)


@pytest.mark.parametrize("kind", [Standardised, Scaled, Twice, Streaming, OtherBias, Dependent])
def test_what_does_more_is_refused(kind: type[nn.Module]) -> None:
    layer = kind(4, 6, 3)
    assert asked(layer) is None
    with pytest.raises(TargetError, match=f"{kind.__name__}.*cannot be adapted"):
        attach(nn.Sequential(layer), AdapterConfig(targets="0"))


def test_asking_leaves_the_layer_and_the_random_numbers_alone() -> None:
    layer = Normed(4, 6, 3).train()
    before, draws = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    attributes = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    assert asked(layer) == "prepared"
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert {name: value for name, value in vars(layer).items() if not name.startswith("_")} == attributes
    assert torch.equal(torch.get_rng_state(), draws)


def test_layers_without_data_are_asked_too() -> None:
    model = nn.Sequential(Same(4, 6, 3, device="meta"), Standardised(4, 6, 3, device="meta"))
    assert list(Survey(model).kinds) == ["0"]


def test_a_pair_of_peft_fits_where_nothing_is_prepared() -> None:
    """PEFT's A never sees what the layer's own forward makes of its input; with kernel 1 there is nothing to pad."""
    for make, fits in ((lambda: Same(4, 6, 1), True), (lambda: Same(4, 6, 3), False)):
        _, handle, _ = adapted(make)
        value = replace(handle.adapter("default"), kinds={"0": PEFT_CONVOLUTION})
        if fits:
            attach(nn.Sequential(make()), value)
            continue
        with pytest.raises(AdapterError, match=r"pair of PEFT, .* this Same has a forward of its own that prepares"):
            attach(nn.Sequential(make()), value)


def test_a_pair_that_reaches_across_the_groups_acts_and_does_not_merge() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Same(4, 6, 1, groups=2)), torch.randn(2, 4, 7, 7)
    base = model(x)
    A, B = torch.randn(4, 4, 1, 1), torch.randn(6, 2, 1, 1)
    config = AdapterConfig(targets="0", method=LoraMethod(rank=4, alpha=4))
    handle = attach(model, Adapter(config, {"0": {"A": A, "B": B}}))
    torch.testing.assert_close(model(x), base + functional.conv2d(functional.conv2d(x, A), B, groups=2))
    with pytest.raises(MergeError, match="reaches across the groups"):
        handle.merge()
