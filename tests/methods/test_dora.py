"""DoRA: the factored norm, the detached norm, magnitudes, and what the paper says of W'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, DoraMethod
from sideroad.errors import MergeError, TargetError
from sideroad.handle import Attached
from sideroad.methods.dora import DoraDelta


def build(dtype: torch.dtype = torch.float32, **numbers: float) -> tuple[nn.Sequential, Attached, DoraDelta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7)).to(dtype)
    handle = attach(model, AdapterConfig(method=DoraMethod(rank=3, alpha=6, **numbers)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters("default").values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    delta = handle.deltas("default")["0"]
    assert isinstance(delta, DoraDelta)
    return model, handle, delta


def dense(layer: nn.Linear, delta: DoraDelta) -> Tensor:
    """W' by the formula, B A formed."""
    whole = layer.weight + delta.scale * delta.B @ delta.A
    return delta.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()


def test_the_factored_norm_is_that_of_the_product() -> None:
    model, _, delta = build()
    whole = model[0].weight + delta.scale * delta.B @ delta.A
    torch.testing.assert_close(delta._norms(model[0].weight), whole.norm(dim=1).detach(), rtol=2e-6, atol=0)


def test_output_and_gradients_are_those_of_the_formula() -> None:
    model, handle, delta = build()
    x = torch.randn(4, 10)
    expected = torch.nn.functional.linear(x, dense(model[0], delta), model[0].bias)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = list(handle.parameters("default").values())
    weights = torch.randn(4, 7)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    got = torch.autograd.grad((found * weights).sum(), parameters)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_of_the_merged_weight_are_as_long_as_the_magnitudes() -> None:
    model, handle, delta = build()
    with handle.merged():
        torch.testing.assert_close(model[0].weight.norm(dim=1), delta.magnitude.detach().abs(), rtol=1e-5, atol=0)


def test_no_product_of_the_factors_is_formed() -> None:
    model, _, _ = build()
    seen: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and "mm" in str(func):
                seen.append(tuple(out.shape))
            return out

    with Watch():
        model(torch.randn(4, 10))
    assert seen
    assert (7, 10) not in seen


def test_dropout_acts_on_both_terms() -> None:
    model, _, delta = build(dropout=0.5)
    model.train()
    x = torch.randn(64, 10)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    layer = model[0]
    gain = delta.gain(layer)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias) + (gain - 1) * (dropped @ layer.weight.t())
    expected = expected + gain * delta.scale * (dropped @ delta.A.t() @ delta.B.t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_one_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    with torch.no_grad():
        model[0].weight[2] = 0
    handle = attach(model, AdapterConfig(method=DoraMethod(rank=2)), seed=0)
    out = model(torch.randn(3, 5))
    out.sum().backward()
    assert not out[:, 2].any()
    assert all(bool(one.grad.isfinite().all()) for one in handle.parameters("default").values())


def test_16_bit_bases_are_scaled_by_exact_norms() -> None:
    model, _, delta = build(torch.bfloat16)
    assert delta.magnitude.dtype == torch.float32
    whole = model[0].weight.float() + delta.scale * delta.B @ delta.A
    torch.testing.assert_close(delta._norms(model[0].weight), whole.norm(dim=1).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (nn.Sequential(nn.Embedding(9, 4)), {"targets": "0"}, "0 is an embedding, which has no rows that outputs are"),
        (nn.Sequential(nn.Linear(4, 6)), {"slices": {"0": (True, False)}}, "which dora does not know"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), {"targets": "0"}, "DoRA scales the output of a layer"),
    ],
)
def test_layers_it_cannot_act_on_are_refused_by_name(model: nn.Module, fields: dict[str, object], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        attach(model, AdapterConfig(method=DoraMethod(rank=2), **fields))


def test_a_gain_next_to_1_acts_in_16_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).to(torch.bfloat16)
    handle = attach(model, AdapterConfig(method=DoraMethod(rank=2)), seed=0)
    x = torch.randn(512, 256).to(torch.bfloat16)
    before = model(x).float()
    with torch.no_grad():
        # bfloat16 has no number between 1 and 1.0078, so as a factor this would be 1
        handle.parameters("default")["0.magnitude"].mul_(1.003)
    assert float((model(x).float() / before).nanmean()) == pytest.approx(1.003, abs=1e-3)


def test_norms_follow_a_base_that_is_loaded_later_and_are_exact_under_autocast() -> None:
    model, _, delta = build()
    whole = model[0].weight + delta.scale * delta.B @ delta.A
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(delta._norms(model[0].weight), whole.norm(dim=1).detach(), rtol=2e-6, atol=0)
    state = {name: 2 * one if name == "0.weight" else one for name, one in model.state_dict().items()}
    model.load_state_dict(state)
    whole = model[0].weight + delta.scale * delta.B @ delta.A
    torch.testing.assert_close(delta._norms(model[0].weight), whole.norm(dim=1).detach(), rtol=2e-6, atol=0)


def test_an_fp64_base_is_the_base_at_step_0() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7)).double()
    x = torch.randn(4, 10).double()
    before = model(x)
    attach(model, AdapterConfig(method=DoraMethod(rank=3)), seed=0)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, float("nan")), (torch.float16, 1e7)])
def test_a_magnitude_that_would_break_the_weight_is_not_merged(dtype: torch.dtype, value: float) -> None:
    _, handle, delta = build(dtype)
    with torch.no_grad():
        delta.magnitude[3] = value
    with pytest.raises(MergeError, match=r"not finite into 1 parameters: 0\.weight"):
        handle.merge()
