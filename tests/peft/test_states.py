"""PeftModel: which adapter acts, which is trained, its scale and its status (behaviours 35 to 39)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import peft
import pytest
import torch
from pairs import both, bytes_of, config, fill, logits, quiet, relative, same, tiny_gpt2, two, wrapped
from tiny import tiny_llama
from torch import nn

from sideroad.errors import AdapterError, MergeError, TargetError
from sideroad.peft import get_model_status, get_peft_model


def trainable(model: nn.Module, name: str) -> bool:
    flags = {one.requires_grad for key, one in model.named_parameters() if f".lora.{name}." in key}
    assert len(flags) == 1
    return flags.pop()


def test_35_disabled_gives_the_base_nested_and_after_an_exception() -> None:
    model, says = two(), logits(tiny_llama())
    acting = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), says)
        with model.disable_adapter():
            assert torch.equal(logits(model), says)
        assert torch.equal(logits(model), says)
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), acting)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), acting)


def test_35_disabled_gives_the_base_while_merged_and_d8_changes_nothing() -> None:
    model, says = wrapped(), logits(tiny_llama())
    model.merge_adapter()
    merged = bytes_of(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), says)
    assert same(bytes_of(model), merged)
    assert model.base_model.merged_adapters == ["default"]
    with pytest.raises(MergeError, match="is merged into the weights"):
        model.disable_adapter_layers()
    assert same(bytes_of(model), merged)


def test_35_what_is_chosen_inside_a_disabled_block_acts_after_it() -> None:
    model, says = two(), logits(tiny_llama())
    model.set_adapter("b")
    b = logits(model)
    model.set_adapter("default")
    with model.disable_adapter():
        model.set_adapter("b")
        assert torch.equal(logits(model), says)
    assert torch.equal(logits(model), b)
    with contextlib.suppress(KeyError), model.disable_adapter():
        model.set_adapter("default")
        raise KeyError
    assert model.active_adapter == "default"
    assert not torch.equal(logits(model), b)


def test_35_switching_off_stays_until_it_is_switched_on() -> None:
    model, says = two(), logits(tiny_llama())
    acting = logits(model)
    model.base_model.disable_adapter_layers()
    model.set_adapter("b")
    assert torch.equal(logits(model), says)
    with model.disable_adapter():
        assert torch.equal(logits(model), says)
    assert torch.equal(logits(model), says)
    assert model.get_model_status().enabled is False
    with pytest.raises(MergeError, match="adapters are disabled"):
        model.merge_adapter()
    model.enable_adapter_layers()
    model.set_adapter("default")
    assert torch.equal(logits(model), acting)


def test_36_delete_active_inactive_unknown_and_merged() -> None:
    model = two()
    b = bytes_of(model)
    model.delete_adapter("b")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert not [name for name in model.state_dict() if ".lora.b." in name]
    assert not hasattr(model.get_base_model().model.layers[0].self_attn.k_proj, "lora")
    with pytest.raises(AdapterError, match=r'no adapter is named "b". There are: default'):
        model.delete_adapter("b")
    model = two()
    model.set_requires_grad("b", False)
    with pytest.warns(UserWarning, match='"default" was active and is deleted; "b" acts now'):
        model.delete_adapter("default")
    assert model.active_adapter == "b"
    assert not trainable(model, "b")
    assert model.state_dict().keys() == {name for name in b if ".lora.default." not in name}
    model.merge_adapter()
    before = bytes_of(model)
    with pytest.raises(MergeError, match="is merged into the weights"):
        model.delete_adapter("b")
    assert same(bytes_of(model), before)
    assert list(model.peft_config) == ["b"]


def test_36_the_last_one_can_go_and_another_come() -> None:
    model = wrapped()
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert model.active_adapters == []
    with pytest.raises(AdapterError, match="no adapter is active"):
        _ = model.active_peft_config
    with pytest.raises(AdapterError, match="no adapter is left"):
        model.merge_adapter()
    model.add_adapter("new", config())
    assert model.active_adapter == "new"


def test_37_trainable_follows_the_choice_and_nothing_else() -> None:
    model = two()
    assert (trainable(model, "default"), trainable(model, "b")) == (True, False)
    model.set_adapter("b")
    assert (trainable(model, "default"), trainable(model, "b")) == (False, True)
    model.set_adapter(["default", "b"], inference_mode=True)
    assert (trainable(model, "default"), trainable(model, "b")) == (False, False)
    assert model.active_adapter == ["default", "b"]
    model.set_adapter(["default", "b"])
    assert (trainable(model, "default"), trainable(model, "b")) == (True, True)
    model.set_requires_grad("b", False)
    assert (trainable(model, "default"), trainable(model, "b")) == (True, False)
    model.set_requires_grad(["b", "default"])
    assert (trainable(model, "default"), trainable(model, "b")) == (True, True)
    with pytest.raises(AdapterError, match='no adapter is named "x", "y"'):
        model.set_adapter(["x", "b", "y"])
    assert model.active_adapters == ["default", "b"]
    assert not trainable(get_peft_model(tiny_llama(), config(inference_mode=True)), "default")


def test_several_adapters_act_as_their_sum_like_pefts() -> None:
    ours, theirs = both()
    ours.add_adapter("b", config(target_modules=["k_proj", "q_proj"], r=2))
    fill(ours, seed=2)
    with quiet():
        theirs.add_adapter("b", peft.LoraConfig(target_modules=["k_proj", "q_proj"], r=2))
        for name in ("default", "b"):
            from sideroad.peft import get_peft_model_state_dict

            peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours, adapter_name=name), name)
        theirs.base_model.set_adapter(["default", "b"])
    ours.set_adapter(["default", "b"])
    assert relative(logits(ours), logits(theirs)) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_d19_new_modules_take_over_the_training_flag(training: bool) -> None:
    model = get_peft_model(tiny_llama().train(training), config(lora_dropout=0.5))
    model.add_adapter("b", config(lora_dropout=0.5))
    assert {one.training for one in model.modules()} == {training}
    fill(model)
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(model)) is not training


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "down_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_fc"], "bias": "all"}),
    ],
)
def test_38_the_state_of_every_layer_equals_pefts(make: Any, fields: dict[str, Any]) -> None:
    ours, theirs = both(make, **fields)
    for here, there in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        kind = {"module_type": "lora.Linear"}  # PEFT calls its layer on a Conv1D so
        assert dataclasses.asdict(here) | kind == dataclasses.asdict(there)


def test_38_the_state_of_the_model_equals_pefts() -> None:
    ours, theirs = both(target_modules=["q_proj", "down_proj"])
    assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())
    ours.merge_adapter()
    ours.set_requires_grad("default", False)
    next(one for name, one in ours.named_parameters() if ".lora." in name).requires_grad_(True)
    status = ours.get_model_status()
    assert status.merged_adapters == ["default"]
    assert status.requires_grad == {"default": "irregular"}
    with pytest.raises(AdapterError, match="has no adapters, so there is no status"):
        get_model_status(tiny_llama())


@pytest.mark.parametrize("rslora", [False, True])
def test_39_scaling_is_set_multiplied_and_put_back(rslora: bool) -> None:
    ours, theirs = both(use_rslora=rslora)
    plain = logits(ours)
    layers = [one for one in theirs.modules() if isinstance(one, peft.tuners.lora.LoraLayer)]
    ours.set_scale("default", 0.5)
    for layer in layers:
        layer.set_scale("default", 0.5)
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    ours.scale_layer(3)
    for layer in layers:
        layer.scale_layer(3)
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    ours.unscale_layer(3)
    for layer in layers:
        layer.unscale_layer(3)
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    ours.unscale_layer()
    assert torch.equal(logits(ours), plain)
    with pytest.raises(AdapterError, match="must be a finite number"):
        ours.set_scale("default", float("nan"))
    ours.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        ours.set_scale("default", 2)


def test_odd_words_are_told() -> None:
    model = two()
    with pytest.raises(AdapterError, match=r"unscale_layer\(0\) would divide by zero"):
        model.unscale_layer(0)
    model.base_model.disable_adapter_layers()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="merging while adapters are disabled"):
            merge()
    with pytest.raises(TargetError, match="matches no module of LlamaForCausalLM"):
        get_peft_model(tiny_llama(), config(modules_to_save=["lm[head"]))


def test_a_scale_that_cannot_act_is_not_kept() -> None:
    model = wrapped(modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"give it weight 1"):
        model.set_scale("default", 0.5)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.add_adapter("b", config())
    model.merge_adapter()


def test_a_copy_made_while_disabled_can_be_switched_on() -> None:
    model = wrapped()
    with model.disable_adapter():
        twin = copy.deepcopy(model)
        base = logits(model)
    assert torch.equal(logits(twin), base)
    twin.base_model.enable_adapter_layers()
    assert torch.equal(logits(twin), logits(model))


def test_the_name_of_the_base_is_no_adapters() -> None:
    with pytest.raises(AdapterError, match=r'cannot be named "__base__": in adapter_names that means the base'):
        wrapped().add_adapter("__base__", config())


def test_a_choice_that_is_refused_leaves_a_merged_model_merged() -> None:
    model = wrapped(modules_to_save=["lm_head"])
    model.add_adapter("b", config(modules_to_save=["lm_head"]))
    model.merge_adapter(["default"])
    refused = pytest.raises(AdapterError, match="only one of them can act")
    with pytest.warns(UserWarning, match="unmerged first"), refused:
        model.set_adapter(["default", "b"])
    assert model.base_model.merged_adapters == ["default"]
