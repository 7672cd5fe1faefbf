"""handle: which adapters act, and contexts that nothing can leak from."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor, nn

from sideroad.adapter import BaseRecord
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, MergeError

Q = AdapterConfig(targets="q_proj")


def three() -> Attached:
    model = tiny_llama()
    for name, config in (("a", Q), ("b", AdapterConfig(targets=("q_proj", "v_proj"))), ("c.d", AdapterConfig())):
        fill(attach(model, config, name), name)
    handle = attach(model, Q, "unused")
    return handle


def logits(handle: Attached) -> Tensor:
    return handle.model(IDS).logits.detach()


def test_weights_scale_and_add() -> None:
    handle = three()
    with handle.disabled():
        base = logits(handle)
    handle.activate({"a": 0.0})
    assert torch.equal(logits(handle), base)
    handle.activate(())
    assert handle.active == {}
    assert torch.equal(logits(handle), base)
    layer = handle.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    changes = {}
    for name in ("a", "b"):
        handle.activate(name)
        changes[name] = layer(x) - torch.nn.functional.linear(x, layer.weight)
    handle.activate({"a": 0.5, "b": -2.0})
    assert handle.active == {"a": 0.5, "b": -2.0}
    expected = torch.nn.functional.linear(x, layer.weight) + 0.5 * changes["a"] - 2.0 * changes["b"]
    torch.testing.assert_close(layer(x), expected)
    handle.activate(["a", "b"])
    assert handle.active == {"a": 1.0, "b": 1.0}


def test_switching_never_changes_requires_grad() -> None:
    handle = three()
    handle.set_trainable("b")

    def flags() -> dict[str, bool]:
        return {name: all(p.requires_grad for p in handle.parameters(name).values()) for name in handle.names}

    expected = {"a": False, "b": True, "c.d": False, "unused": False}
    assert flags() == expected
    handle.activate("a")
    with handle.using("c.d"), handle.disabled():
        assert flags() == expected
    attach(handle.model, handle.adapter("a"), "again")
    handle.load("a", handle.adapter("again"))
    assert flags() == {**expected, "again": False}
    handle.set_trainable(())
    assert not any(flags().values())


def test_contexts_nest_and_restore_after_exceptions() -> None:
    handle = three()
    handle.activate({"a": 0.5})
    before = logits(handle)
    with suppress(ZeroDivisionError), handle.using("b"):
        inside = logits(handle)
        with handle.disabled():
            assert handle.active == {}
            with handle.using(["b"]):
                assert torch.equal(logits(handle), inside)
            assert handle.active == {}
        assert torch.equal(logits(handle), inside)
        handle.activate("c.d")
        raise ZeroDivisionError
    assert handle.active == {"a": 0.5}
    assert torch.equal(logits(handle), before)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    handle = three()
    for call in (handle.activate, handle.paths, handle.parameters, handle.adapter, handle.detach, handle.set_trainable):
        with pytest.raises(AdapterError, match=r'no adapter is named "c.e". Attached: a, b, c.d, unused. Did you mean'):
            call("c.e")
    with pytest.raises(AdapterError, match='no adapter is named "x"'), handle.using({"a": 1.0, "x": 1.0}):
        pass
    with pytest.raises(AdapterError, match='weight of adapter "a" is nan; it must be a finite number'):
        handle.activate({"a": float("nan")})
    assert handle.active == {"a": 1.0}


def test_detach_one_leaves_the_others() -> None:
    handle = three()
    handle.activate("b")
    expected = logits(handle)
    handle.detach("a")
    assert handle.names == ("b", "c.d", "unused")
    assert torch.equal(logits(handle), expected)
    handle.detach("b")
    assert handle.active == {}
    handle.detach()
    assert list(handle.model.state_dict()) == list(tiny_llama().state_dict())
    assert not any(module._forward_hooks for module in handle.model.modules())


@pytest.mark.parametrize("call", ["merge", "unmerge", "merge_and_unload", "detach"])
def test_what_would_break_a_context_is_refused_inside_it(call: str) -> None:
    handle = three()
    for context in (handle.using("b"), handle.rows(["b"]), handle.disabled()):
        with (
            context,
            pytest.raises(AdapterError, match=rf"{call}\(\) inside a using\(\), rows\(\) or disabled\(\) block"),
        ):
            getattr(handle, call)()
    assert handle.names == ("a", "b", "c.d", "unused")


def test_adapter_is_a_value() -> None:
    handle = three()
    value = handle.adapter("b")
    assert value.config.targets == ("q_proj", "v_proj")
    tensor = value.weights["model.layers.0.self_attn.q_proj"]["A"]
    tensor.zero_()
    assert handle.parameters("b")["model.layers.0.self_attn.q_proj.A"].abs().sum() > 0
    assert not tensor.requires_grad


def test_adapter_names_exactly_what_was_adapted() -> None:
    config = AdapterConfig(targets="*self_attn*", exclude=("k_proj",), layers="1-", rank_pattern={"q_proj": 2})
    handle = attach(tiny_llama(), config)
    value = handle.adapter("default")
    assert value.config.targets == ("1.self_attn.q_proj", "1.self_attn.v_proj", "1.self_attn.o_proj")
    assert value.config.layers is None
    assert value.config.exclude == ()
    again = attach(tiny_llama(), value)
    assert again.paths("default") == handle.paths("default")
    assert attach(tiny_llama(), value.config).paths("default") == handle.paths("default")


def test_description_survives() -> None:
    handle = three()
    value = handle.adapter("a")
    described = replace(value, base=BaseRecord(name="tiny"), task_type="SEQ_CLS", manifest={"k": 1})
    attach(handle.model, described, "told")
    told = handle.adapter("told")
    assert (told.base, told.task_type, told.manifest) == (BaseRecord(name="tiny"), "SEQ_CLS", {"k": 1})


def test_load_overwrites_in_place_and_takes_the_scale() -> None:
    handle = three()
    source = three()
    kept = handle.parameters("a")
    louder = source.adapter("b").config.method.model_copy(update={"alpha": 64.0})
    value = source.adapter("a")
    handle.load("a", replace(value, config=value.config.model_copy(update={"method": louder})))
    assert all(handle.parameters("a")[name] is parameter for name, parameter in kept.items())
    handle.activate("a")
    source.activate({"a": 4.0})
    torch.testing.assert_close(logits(handle), logits(source))


def test_load_is_strict_and_all_or_nothing() -> None:
    handle = three()
    before = handle.adapter("a")
    with pytest.raises(AdapterError) as caught:
        handle.load("a", three().adapter("b"))
    assert "model.layers.0.self_attn.v_proj.A is not part of the attached adapter." in str(caught.value)
    small = attach(tiny_llama(), AdapterConfig(targets="q_proj", layers="0", method=LoraMethod(rank=2)))
    with pytest.raises(AdapterError) as caught:
        handle.load("a", small.adapter("default"))
    assert "layers.0.self_attn.q_proj.A is [2, 32]; needed [8, 32]." in str(caught.value)
    assert "layers.1.self_attn.q_proj.B is missing." in str(caught.value)
    assert handle.adapter("a").same_weights(before)


def test_names_within_names_do_not_meet() -> None:
    model = tiny_llama()
    for name in ("lora", "lora_A", "A", "a.b", "a"):
        fill(attach(model, Q, name), name)
    handle = attach(model, Q, "last")
    handle.activate("a")
    expected = logits(handle)
    for name in ("lora", "A", "a.b", "lora_A"):
        handle.detach(name)
    assert torch.equal(logits(handle), expected)
    assert handle.names == ("a", "last")


def test_activate_while_merged_is_refused() -> None:
    handle = three()
    handle.merge()
    for call in (handle.activate, lambda name: handle.using(name).__enter__(), handle.detach):
        with pytest.raises(MergeError, match=r"while a is merged into the weights; unmerge\(\) first"):
            call("b")
    with pytest.raises(MergeError, match='adapter "a" is merged; unmerge'):
        handle.load("a", handle.adapter("a"))
    assert handle.names == ("a", "b", "c.d", "unused")


def test_a_second_thread_sees_the_block_but_cannot_switch() -> None:
    handle = three()
    before = handle.active
    with handle.using("b"):
        inside = logits(handle)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(logits, handle).result(), inside)
            for act in (lambda: handle.using(()).__enter__(), lambda: handle.disabled().__enter__(),
                        lambda: handle.activate("a"), lambda: handle.merged().__enter__()):  # fmt: skip
                with pytest.raises(AdapterError, match="another thread is inside"):
                    pool.submit(act).result()
        assert handle.active == {"b": 1.0}
        with handle.disabled():
            pass
    assert handle.active == before
    with ThreadPoolExecutor(1) as pool:
        pool.submit(handle.activate, "a").result()
    assert handle.active == {"a": 1.0}


def test_a_copy_made_inside_a_block_is_not_inside_it() -> None:
    handle = three()
    with handle.using("b"):
        for copied in (copy.deepcopy(handle.model), pickle.loads(pickle.dumps(handle.model))):
            other = attached(copied)
            assert other is not None
            assert other.active == {"b": 1.0}
            other.merge()
            other.unmerge()
            other.detach()
    assert handle.active == {"a": 1.0}


def test_a_join_that_fails_in_any_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before, flags = list(model.state_dict()), [one.requires_grad for one in model.parameters()]
    layer = model.model.layers[1].self_attn.q_proj

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(layer, "register_forward_hook", broken)
    with pytest.raises(RuntimeError, match="no hooks here"):
        attach(model, Q)
    assert list(model.state_dict()) == before
    assert [one.requires_grad for one in model.parameters()] == flags
    assert attached(model) is None


def test_load_keeps_what_the_model_says_about_kinds(tmp_path: Path) -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    config = AdapterConfig(targets=("mha", "mha.out_proj"), method=LoraMethod(rank=2))
    handle = attach(model, config)
    value = handle.adapter("default")
    handle.load("default", replace(value, kinds={}, config=config.model_copy(update={"dtype": "base"})))
    again = handle.adapter("default")
    assert again.kinds == {"mha.out_proj": "attention-output"}
    assert again.config.dtype == "base"


def test_a_thread_that_ended_inside_a_block_locks_nobody_out() -> None:
    handle = three()

    def leave_open() -> None:
        handle.using("b").__enter__()

    thread = Thread(target=leave_open)
    thread.start()
    thread.join()
    handle.activate("a")
    assert handle.active == {"a": 1.0}
    with handle.using("b"):
        assert handle.active == {"b": 1.0}
    assert handle.active == {"a": 1.0}
