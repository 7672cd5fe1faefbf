"""merging: fp32 sums rounded once, stored bytes back, and refusals that change nothing."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor, nn

from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, MergeError


def two(dtype: torch.dtype = torch.float32) -> Attached:
    model = tiny_llama().to(dtype)
    fill(attach(model, AdapterConfig(targets=("q_proj", "up_proj")), "a"), "a")
    handle = attach(model, AdapterConfig(targets=("q_proj", "v_proj")), "b")
    fill(handle, "b")
    return handle


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(value, two[key]) for key, value in one.items())


def test_sum_of_several_is_taken_in_fp32_and_rounded_once() -> None:
    handle = two(torch.bfloat16)
    q = handle.model.model.layers[0].self_attn.q_proj
    base = q.weight.detach().clone()
    parts = {name: handle.parameters(name) for name in ("a", "b")}
    path = "model.layers.0.self_attn.q_proj"
    handle.merge({"a": 0.5, "b": -1.5})
    change = sum(
        weight * 2.0 * parts[name][f"{path}.B"].double() @ parts[name][f"{path}.A"].double()
        for name, weight in (("a", 0.5), ("b", -1.5))
    )
    exact = base.double() + change
    assert torch.equal(q.weight, exact.to(torch.bfloat16))
    assert handle.merged_names == ("a", "b")
    assert handle.active == {"a": 0.5, "b": -1.5}


def test_merged_model_gives_the_same_logits_without_a_delta() -> None:
    handle = two()
    handle.activate({"a": 0.5, "b": 2.0})
    apart = handle.model(IDS).logits
    handle.merge()
    torch.testing.assert_close(handle.model(IDS).logits, apart, rtol=1e-5, atol=1e-5)
    for parameter in handle.parameters("a").values():
        parameter.data.fill_(1e9)
    torch.testing.assert_close(handle.model(IDS).logits, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unmerge_gives_the_bytes_back(dtype: torch.dtype) -> None:
    handle = two(dtype)
    handle.activate({"b": 0.25})
    before = bits(handle.model)
    handle.merge("a")
    assert not same(bits(handle.model), before)
    handle.unmerge()
    assert same(bits(handle.model), before)
    assert handle.active == {"b": 0.25}


def test_thousand_cycles_leave_every_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    before = model[0].weight.detach().clone()
    handle = attach(model, AdapterConfig(targets="0"))
    fill(handle)
    for _ in range(1000):
        handle.merge()
        handle.unmerge()
    assert torch.equal(model[0].weight, before)


def test_second_merge_is_nothing_or_refused() -> None:
    handle = two()
    handle.merge("a")
    merged = bits(handle.model)
    handle.merge("a")
    handle.merge()
    assert same(bits(handle.model), merged)
    for other in ("b", {"a": 0.5}, ["a", "b"]):
        with pytest.raises(MergeError, match=r"already merged: a; unmerge\(\) before merging another set"):
            handle.merge(other)
    assert same(bits(handle.model), merged)


def test_disabled_while_merged_swaps_the_base_in_and_out() -> None:
    handle = two(torch.bfloat16)
    with handle.disabled():
        base = handle.model(IDS).logits
    handle.merge()
    merged = bits(handle.model)
    expected = handle.model(IDS).logits
    with suppress(ZeroDivisionError), handle.disabled():
        assert torch.equal(handle.model(IDS).logits, base)
        assert handle.active == {}
        with handle.disabled():
            assert torch.equal(handle.model(IDS).logits, base)
        assert torch.equal(handle.model(IDS).logits, base)
        raise ZeroDivisionError
    assert same(bits(handle.model), merged)
    assert torch.equal(handle.model(IDS).logits, expected)
    handle.unmerge()
    with handle.disabled():
        assert torch.equal(handle.model(IDS).logits, base)


def test_merged_context_restores_after_exceptions_and_nests() -> None:
    handle = two()
    before = bits(handle.model)
    with suppress(ZeroDivisionError), handle.using("b"), handle.merged():
        assert handle.merged_names == ("b",)
        with handle.merged("b"), handle.disabled():
            pass
        assert handle.merged_names == ("b",)
        raise ZeroDivisionError
    assert handle.merged_names == ()
    assert handle.active == {"a": 1.0}
    assert same(bits(handle.model), before)


def test_without_the_base_there_is_no_way_back() -> None:
    handle = two()
    handle.merge("a", keep_base=False)
    merged = bits(handle.model)
    with pytest.raises(MergeError, match="keep_base=False: its weights are gone; load the base again"):
        handle.unmerge()
    with pytest.raises(MergeError, match="keep_base=False"), handle.disabled():
        pass
    assert same(bits(handle.model), merged)
    assert handle.active == {"a": 1.0}
    assert list(handle.merge_and_unload().state_dict()) == list(tiny_llama().state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 60_000.0])
def test_results_that_are_not_finite_change_nothing(value: float) -> None:
    handle = two(torch.float16)
    last = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        handle.parameters("a")[f"{last}.B"][3].fill_(value)
    before = bits(handle.model)
    with pytest.raises(MergeError, match=rf"not finite into 1 parameters: {last}.weight \(float16\). Nothing was"):
        handle.merge("a")
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in handle.model.state_dict().items())
    assert handle.merged_names == ()
    handle.merge("b")


def test_an_interrupt_in_the_middle_leaves_no_half_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    from sideroad import merging

    handle = two()
    before = bits(handle.model)
    calls = []

    def interrupted(layer: nn.Module, values: dict[str, Tensor]) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        genuine(layer, values)

    genuine = merging.write_parameters
    monkeypatch.setattr(merging, "write_parameters", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.merge()
    assert same(bits(handle.model), before)
    assert handle.merged_names == ()


def test_adding_while_merged_is_allowed_and_inactive() -> None:
    handle = two()
    handle.merge()
    expected = handle.model(IDS).logits
    fill(attach(handle.model, AdapterConfig(), "late"), "late")
    assert torch.equal(handle.model(IDS).logits, expected)
    assert handle.active == {"a": 1.0}
    handle.unmerge()
    assert handle.active == {"a": 1.0}


def test_merge_and_unload_returns_the_plain_model() -> None:
    handle = two()
    handle.activate("b")
    expected = handle.model(IDS).logits
    model = handle.merge_and_unload()
    assert model is handle.model
    assert attached(model) is None
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_copies_of_a_merged_model_can_unmerge() -> None:
    handle = two(torch.bfloat16)
    before = bits(handle.model)
    handle.merge()
    for twin in (copy.deepcopy(handle.model), pickle.loads(pickle.dumps(handle.model))):
        other = attached(twin)
        assert other is not None
        other.unmerge()
        assert same(bits(twin), before)
    assert handle.merged_names == ("a",)


def test_nothing_to_merge_or_unmerge() -> None:
    handle = two()
    with pytest.raises(MergeError, match="nothing is merged"):
        handle.unmerge()
    handle.activate(())
    for call in (handle.merge, handle.merge_and_unload):
        with pytest.raises(AdapterError, match="no adapter is active, so there is nothing to merge; name one of: a, b"):
            call()


def test_meta_models_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(9, 9))
    with pytest.raises(MergeError, match="0 is on the meta device"):
        attach(model, AdapterConfig(targets="0")).merge()


@pytest.mark.parametrize("moment", [1, 3])
def test_ctrl_c_while_weights_are_written_waits_for_a_whole_state(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    from sideroad import merging

    calls: list[nn.Module] = []

    def struck(layer: nn.Module, values: dict[str, Tensor]) -> None:
        calls.append(layer)
        if len(calls) == moment:
            signal.raise_signal(signal.SIGINT)
        genuine(layer, values)

    def strike(act: Callable[[], object]) -> None:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(merging, "write_parameters", struck)
            with pytest.raises(KeyboardInterrupt):
                act()
        assert len(calls) >= moment

    def enter(block: AbstractContextManager[object]) -> None:
        with block:
            raise AssertionError("the interrupt came first")

    genuine = merging.write_parameters
    handle = two()
    before = bits(handle.model)
    strike(lambda: enter(handle.merged()))
    assert same(bits(handle.model), before)
    assert (handle.merged_names, dict(handle.active)) == ((), {"a": 1.0})
    strike(handle.merge)
    assert handle.merged_names == ("a",)
    merged = bits(handle.model)
    strike(lambda: enter(handle.disabled()))
    assert same(bits(handle.model), merged)
    assert handle.active == {"a": 1.0}
    strike(handle.unmerge)
    assert same(bits(handle.model), before)
    assert (handle.merged_names, dict(handle.active)) == ((), {"a": 1.0})
    handle.merge()
    with pytest.raises(KeyboardInterrupt), handle.disabled():
        raise KeyboardInterrupt
    assert same(bits(handle.model), merged)
    handle.unmerge()
    strike(handle.merge_and_unload)
    assert attached(handle.model) is None
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(handle.model.state_dict()[name], merged[name])


def test_an_error_while_the_base_is_swapped_in_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sideroad import merging

    handle = two()
    handle.merge()
    merged = bits(handle.model)
    calls: list[nn.Module] = []

    def failing(layer: nn.Module, values: dict[str, Tensor]) -> None:
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        genuine(layer, values)

    genuine = merging.write_parameters
    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_parameters", failing)
        with pytest.raises(MemoryError), handle.disabled():
            pass
    assert same(bits(handle.model), merged)
    assert handle.active == {"a": 1.0}


def test_an_error_in_the_middle_says_that_a_base_that_was_not_kept_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from sideroad import merging

    def failing(layer: nn.Module, values: dict[str, Tensor]) -> None:
        raise MemoryError

    handle = two()
    monkeypatch.setattr(merging, "write_parameters", failing)
    with pytest.raises(MergeError, match=r"half-way \(MemoryError\) and the base was not kept: load the model again"):
        handle.merge_and_unload()


def test_biases_at_weights_that_do_not_add_up_to_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    config = AdapterConfig(targets="0", bias="adapted", method=LoraMethod(rank=2))
    for name in ("a", "b"):
        handle = attach(model, config, name)
        fill(handle, name)
    handle.activate({"a": 0.5, "b": 2.0})
    x = torch.randn(5, 4)
    apart = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), apart)


def test_a_base_in_64_bits_is_merged_in_64_bits() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).double().eval()
    handle = attach(model, AdapterConfig(targets="0", dtype="base"))
    fill(handle)
    x = torch.randn(5, 16, dtype=torch.float64)
    apart = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), apart, rtol=1e-13, atol=1e-14)


def test_a_copy_made_while_the_base_is_put_in_place_has_nothing_merged() -> None:
    handle = two()
    base = {key: one.clone() for key, one in handle.model.state_dict().items() if ".lora." not in key}
    handle.merge("a")
    with handle.disabled():
        twin = attached(copy.deepcopy(handle.model))
    assert twin is not None
    assert twin.merged_names == ()
    state = twin.model.state_dict()
    assert all(torch.equal(state[key], base[key]) for key in base)
    twin.merge("a")
    assert torch.equal(twin.model(IDS).logits, handle.model(IDS).logits)
