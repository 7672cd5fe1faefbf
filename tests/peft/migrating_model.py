"""Rows of the migration guide about switching and merging: M70 to M96."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from migrating import agree, own, three, trained, trained_by_peft, two
from pairs import both, bytes_of, fill, logits, quiet, relative, same
from tiny import IDS, tiny_llama

from sideroad import attach, errors
from sideroad import peft as door
from sideroad.config import DoraMethod

ROWS = torch.cat([IDS, IDS + 7, IDS + 11])


def m70_choose(folder: Path) -> None:
    ours, theirs, handle = two()
    ours.set_adapter("b")
    theirs.set_adapter("b")
    handle.activate("b")
    assert trained(handle.model) == {"default"}
    handle.set_trainable("b")
    assert trained(ours) == trained(handle.model) == trained_by_peft(theirs) == {"b"}
    agree(ours, theirs, handle)


def m71_sum(folder: Path) -> None:
    ours, theirs, handle = two()
    theirs.base_model.set_adapter(["default", "b"])
    ours.base_model.set_adapter(["default", "b"])
    handle.activate({"default": 1.0, "b": 1.0})
    agree(ours, theirs, handle)
    ours.set_adapter("b")
    ours.set_adapter(["default", "b"])
    agree(ours, theirs)
    handle.activate({"default": 1.0, "b": 0.5})
    ours.set_scale("b", 0.5)
    assert relative(logits(handle.model), logits(ours)) <= 1e-6
    assert relative(logits(handle.model), logits(theirs)) > 1e-3


def m72_disable(folder: Path) -> None:
    ours, theirs, handle = three()
    base = logits(tiny_llama())
    with ours.disable_adapter(), handle.disabled(), theirs.disable_adapter():
        assert torch.equal(logits(ours), base)
        assert torch.equal(logits(handle.model), base)
        agree(ours, theirs)
    agree(ours, theirs, handle)
    ours.merge_adapter()
    with contextlib.suppress(KeyError), ours.disable_adapter():
        assert torch.equal(logits(ours), base)
        raise KeyError
    agree(ours, theirs)


def m73_switch_off(folder: Path) -> None:
    ours, theirs, handle = three()
    for model in (ours, theirs):
        model.base_model.disable_adapter_layers()
    handle.activate(())
    assert torch.equal(logits(ours), logits(tiny_llama()))
    agree(ours, theirs, handle)
    for model in (ours, theirs):
        model.base_model.enable_adapter_layers()
    handle.activate("default")
    agree(ours, theirs, handle)
    ours.merge_adapter()
    with pytest.raises(errors.MergeError, match="merged"):
        ours.base_model.disable_adapter_layers()


def m74_requires_grad(folder: Path) -> None:
    ours, theirs, handle = two()
    for model in (ours, theirs):
        model.set_requires_grad("b", True)
        model.set_requires_grad("default", False)
    handle.set_trainable("b")
    assert trained(ours) == trained(handle.model) == trained_by_peft(theirs) == {"b"}


def m75_delete(folder: Path) -> None:
    ours, theirs, handle = two()
    ours.delete_adapter("b")
    theirs.delete_adapter("b")
    handle.detach("b")
    assert list(ours.peft_config) == list(theirs.peft_config) == list(handle.names) == ["default"]
    agree(ours, theirs, handle)


def m76_scale(folder: Path) -> None:
    ours, theirs, handle = three()
    layers = [one for one in theirs.modules() if isinstance(one, peft.tuners.lora.LoraLayer)]
    for verb, arguments, factor in (
        ("set_scale", ("default", 0.5), 0.5), ("scale_layer", (3,), 1.5), ("unscale_layer", (3,), 0.5),
    ):  # fmt: skip
        getattr(ours, verb)(*arguments)
        for layer in layers:
            getattr(layer, verb)(*arguments)
        handle.activate({"default": factor})
        agree(ours, theirs, handle)
    assert not hasattr(ours.get_base_model().model.layers[0].self_attn.q_proj, "set_scale")
    ours.save_pretrained(folder)
    agree(door.PeftModel.from_pretrained(tiny_llama(), folder), three()[1])
    with pytest.raises(errors.ConfigError, match="set_scale on a DoRA adapter"):
        three({"use_dora": True}, {"method": DoraMethod(rank=4, alpha=8)})[0].set_scale("default", 0.5)


def m77_names(folder: Path) -> None:
    ours, theirs, handle = two()
    for name in ("active_adapter", "active_adapters"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert list(ours.peft_config) == list(theirs.peft_config) == list(handle.names)
    assert ours.active_peft_config.r == theirs.active_peft_config.r
    assert list(handle.active) == ours.active_adapters


def m78_base(folder: Path) -> None:
    ours, theirs, handle = three()
    for model in (ours, theirs):
        assert model.get_base_model() is model.base_model.model
        assert model.model is model.base_model.model
        assert model.lm_head is model.base_model.model.lm_head
        assert model.config is model.get_base_model().config
    assert type(handle.model) is type(ours.get_base_model()) is type(theirs.get_base_model())


def m79_modules(folder: Path) -> None:
    ours, theirs, handle = three({"modules_to_save": ["lm_head"]}, {"modules_to_save": ("lm_head",)})
    assert ours.modules_to_save == theirs.modules_to_save == {"lm_head"}
    assert ours.targeted_module_names == theirs.base_model.targeted_module_names
    assert {*ours.targeted_module_names, "lm_head"} == set(handle.paths("default"))


def m80_count(folder: Path) -> None:
    ours, theirs, handle = three()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert handle.adapter("default").parameters == ours.get_nb_trainable_parameters()[0]


def m81_status(folder: Path) -> None:
    ours, theirs, handle = three()
    assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())
    found = ours.get_layer_status()
    assert list(map(dataclasses.asdict, found)) == list(map(dataclasses.asdict, theirs.get_layer_status()))
    assert [one.name for one in found] == [f"model.{path}" for path in handle.paths("default")]
    assert (handle.merged_names, dict(handle.active)) == ((), {"default": 1.0})


def m82_rows(folder: Path) -> None:
    ours, theirs, handle = two()
    names = ["b", "__base__", "default"]
    expected = logits(theirs, ROWS, adapter_names=names)
    assert relative(logits(ours, ROWS, adapter_names=names), expected) <= 1e-5
    with handle.rows(["b", None, "default"]):
        assert relative(logits(handle.model, ROWS), expected) <= 1e-5
    ours.train()
    theirs.train()
    assert ours(ROWS, adapter_names=names).logits.requires_grad
    with pytest.raises(ValueError, match="training"):
        theirs(ROWS, adapter_names=names)
    for wrong in (["b", "b", "defualt"], ["b"]):
        with pytest.raises(errors.AdapterError):
            ours(ROWS, adapter_names=wrong)
    with ours.disable_adapter(), pytest.raises(errors.AdapterError, match="disabled"):
        ours(ROWS, adapter_names=names)


def m83_generate(folder: Path) -> None:
    ours, theirs, handle = two()
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "input_ids": ROWS}
    with quiet():
        expected = theirs.generate(**options, adapter_names=["b", "__base__", "default"])
        assert torch.equal(ours.generate(**options, adapter_names=["b", "__base__", "default"]), expected)
        with handle.rows(["b", None, "default"], copies=2):
            assert torch.equal(handle.model.generate(**options), expected)  # type: ignore[operator]


def m84_errors(folder: Path) -> None:
    assert not issubclass(errors.SideroadError, ValueError | RuntimeError | KeyError)
    ours, theirs, handle = three()
    with pytest.raises(errors.AdapterError):
        ours.set_adapter("nope")
    with pytest.raises(errors.AdapterError):
        handle.activate("nope")
    with pytest.raises(ValueError, match="nope"):
        theirs.set_adapter("nope")
    for kind in (errors.ConfigError, errors.AdapterError, errors.TargetError, errors.MergeError):
        assert issubclass(kind, errors.SideroadError)


def m90_merge(folder: Path) -> None:
    ours, theirs, handle = two()
    expected = {name: logits(theirs) for name in ("default", "b") if theirs.set_adapter(name) is None}
    theirs.set_adapter("default")
    for names, says in ((None, "default"), (["default"], "default"), (["b"], "b")):
        ours.merge_adapter(names)
        theirs.merge_adapter(names)
        handle.merge(names)
        assert ours.base_model.merged_adapters == list(handle.merged_names) == [says]
        assert relative(logits(ours), expected[says]) <= 1e-5
        assert relative(logits(handle.model), expected[says]) <= 1e-5
        # on v_proj, which "b" does not have, PEFT lets "default" go on
        assert (relative(logits(theirs), expected[says]) <= 1e-5) == (says == "default")
        ours.unmerge_adapter()
        theirs.unmerge_adapter()
        handle.unmerge()


def m91_unmerge(folder: Path) -> None:
    base = tiny_llama().bfloat16()
    before = bytes_of(base)
    ours, theirs = both(lambda: tiny_llama().bfloat16())
    handle = attach(base, own())
    fill(base)
    for _ in range(3):
        for one in (ours, theirs):
            one.merge_adapter()
            one.unmerge_adapter()
        handle.merge()
        handle.unmerge()
    assert same(door.get_base_model_state_dict(ours), before)
    handle.detach()
    assert same(bytes_of(base), before)
    drifted = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(drifted, before["model.layers.0.self_attn.q_proj.weight"])


def m92_merge_and_unload(folder: Path) -> None:
    ours, theirs, handle = three()
    says = logits(ours)
    plain = [ours.merge_and_unload(), theirs.merge_and_unload(), handle.merge_and_unload()]
    assert all(list(one.state_dict()) == list(tiny_llama().state_dict()) for one in plain)
    assert all(relative(logits(one), says) <= 1e-5 for one in plain)


def m93_unload(folder: Path) -> None:
    ours, theirs, handle = three()
    before = bytes_of(tiny_llama())
    handle.detach()
    assert all(same(bytes_of(one), before) for one in (ours.unload(), theirs.unload(), handle.model))


def m94_safe(folder: Path) -> None:
    for safe in (False, True):
        ours, theirs, handle = three()
        next(iter(handle.parameters("default").values())).data.fill_(float("inf"))
        ours.base_model.handle.parameters("default")["model.layers.0.self_attn.q_proj.A"].data.fill_(float("inf"))
        before = door.get_base_model_state_dict(ours)
        for merge in (lambda: ours.merge_adapter(safe_merge=safe), handle.merge):  # noqa: B023
            with pytest.raises(errors.MergeError, match="finite"):
                merge()
        assert same(door.get_base_model_state_dict(ours), before)
        theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.fill_(float("inf"))
        with pytest.raises(ValueError, match="NaN") if safe else contextlib.nullcontext():
            theirs.merge_adapter(safe_merge=safe)


def m95_tied(folder: Path) -> None:
    ours, theirs, handle = three(
        {"target_modules": ["lm_head"]}, {"targets": ("lm_head",)}, lambda: tiny_llama(tie_word_embeddings=True)
    )
    says = logits(ours)
    agree(ours, theirs, handle)
    ours.merge_adapter()
    handle.merge()
    with quiet():
        theirs.merge_adapter()
    assert relative(logits(ours), says) <= 1e-5
    assert relative(logits(handle.model), says) <= 1e-5
    assert handle.untied == ("lm_head",)
    assert relative(logits(theirs), says) > 1e-3


def m96_choose_while_merged(folder: Path) -> None:
    ours, theirs, handle = two()
    for model in (ours, theirs):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="(?i)unmerg"):
            model.set_adapter("b")
    agree(ours, theirs)
    handle.merge()
    with pytest.raises(errors.MergeError, match="merged"):
        handle.activate("b")
