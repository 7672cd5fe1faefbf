"""attaching: what changes on a model, what does not, and what is refused without a trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import IDS, fill, recompute_activations, tiny_llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from sideroad.attaching import attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, TargetError

Q = AdapterConfig(targets="q_proj")


def test_layers_keep_class_names_and_weight() -> None:
    model = tiny_llama()
    weight, before = model.model.layers[0].self_attn.q_proj.weight, list(model.state_dict())
    handle = attach(model, Q, "höf.v1")
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    new = [key for key in model.state_dict() if key not in before]
    assert new[:2] == [f"model.layers.0.self_attn.q_proj.lora.höf%2Ev1.{part}" for part in "AB"]
    assert handle.names == ("höf.v1",)
    assert next(iter(handle.parameters("höf.v1"))) == "model.layers.0.self_attn.q_proj.A"
    assert handle.paths("höf.v1")[1] == "model.layers.1.self_attn.q_proj"


def test_the_task_is_what_the_model_can_do() -> None:
    """PEFT picks a class by it, which asks the base for what generation needs: with a wrong one it cannot load."""
    assert attach(tiny_llama(), Q).adapter("default").task_type == "CAUSAL_LM"
    plain = attach(nn.Sequential(nn.Linear(4, 4)), AdapterConfig(targets="0", method=LoraMethod(rank=2)))
    assert plain.adapter("default").task_type is None
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9))
    assert attach(t5, AdapterConfig(targets="q")).adapter("default").task_type == "SEQ_2_SEQ_LM"


def test_what_generates_from_sound_has_no_task() -> None:
    """PEFT's classes for tasks that generate hand `input_ids` on, which Whisper's forward does not take."""
    shape = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 9, "num_mel_bins": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    model = WhisperForConditionalGeneration(WhisperConfig(**shape, **sizes, **ids))
    assert attach(model, AdapterConfig(targets="q_proj")).adapter("default").task_type is None


def test_one_handle_per_model() -> None:
    model = tiny_llama()
    assert attached(model) is None
    handle = attach(model, Q)
    assert attached(model) is handle
    assert attach(model, Q, "second") is handle
    handle.detach()
    assert attached(model) is None
    assert handle.names == ()


def test_base_is_frozen_and_its_flags_come_back() -> None:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = attach(model, Q)
    own = {id(parameter) for parameter in handle.parameters("default").values()}
    assert all(p.requires_grad == (id(p) in own) for p in model.parameters())
    handle.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_first_acts_and_later_ones_wait() -> None:
    model = tiny_llama()
    handle = attach(model, Q)
    attach(model, Q, "second")
    assert handle.active == {"default": 1.0}


def test_trainable_by_default_only_when_new() -> None:
    model = tiny_llama()
    handle = attach(model, Q)
    value = handle.adapter("default")
    attach(model, value, "loaded")
    attach(model, value, "resumed", trainable=True)
    attach(model, Q, "fixed", trainable=False)
    flags = {name: {p.requires_grad for p in handle.parameters(name).values()} for name in handle.names}
    assert flags == {"default": {True}, "loaded": {False}, "resumed": {True}, "fixed": {False}}


def test_names_that_are_refused_change_nothing() -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match="name cannot be empty"):
        attach(model, Q, "")
    assert attached(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    handle = attach(model, Q)
    fill(handle)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r'named "default" is attached already; detach\("default"\)'):
        attach(model, AdapterConfig())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_wrong_targets_change_nothing() -> None:
    model = tiny_llama()
    before = list(model.state_dict())
    with pytest.raises(TargetError, match="q_projj"):
        attach(model, AdapterConfig(targets="q_projj"))
    assert list(model.state_dict()) == before
    assert attached(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_with_a_lora_of_their_own_are_refused() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    model[1].lora = nn.Identity()
    with pytest.raises(AdapterError, match=r'1 has an attribute named "lora" of its own; exclude it'):
        attach(model, AdapterConfig(targets=("0", "1")))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_part_of_an_attached_model_is_refused() -> None:
    model = tiny_llama()
    attach(model, Q)
    with pytest.raises(AdapterError, match="adapted through another handle"):
        attach(model.model, Q, "second")
    assert attached(model.model) is None


def test_new_modules_inherit_the_training_flag() -> None:
    config = AdapterConfig(targets="q_proj", method=LoraMethod(dropout=0.5))
    evaluating = tiny_llama()
    handle = attach(evaluating, config)
    fill(handle)
    assert torch.equal(evaluating(IDS).logits, evaluating(IDS).logits)
    evaluating.train()
    assert not torch.equal(evaluating(IDS).logits, evaluating(IDS).logits)
    evaluating.eval()
    attach(evaluating, config, "later")
    fill(handle, "later")
    handle.activate("later")
    assert torch.equal(evaluating(IDS).logits, evaluating(IDS).logits)
    mixed = tiny_llama().train()
    mixed.model.layers[0].eval()
    attach(mixed, config)
    assert not mixed.model.layers[0].self_attn.q_proj.lora.default.training
    assert mixed.model.layers[1].self_attn.q_proj.lora.default.training


def test_copy_and_pickle_are_models_of_their_own() -> None:
    model = tiny_llama()
    base = model(IDS).logits
    handle = attach(model, Q)
    fill(handle)
    expected = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = attached(twin)
        assert other is not None
        assert other is not handle
        assert other.model is twin
        assert torch.equal(twin(IDS).logits, expected)
        other.detach()
        assert torch.equal(twin(IDS).logits, base)
        assert list(twin.state_dict()) == list(tiny_llama().state_dict())
        assert torch.equal(model(IDS).logits, expected)


def test_layer_called_with_keywords() -> None:
    model = nn.Sequential(nn.Linear(9, 9))
    handle = attach(model, AdapterConfig(targets="0"))
    fill(handle)
    x = torch.randn(2, 9)
    assert torch.equal(model[0](input=x), model[0](x))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        handle = attach(model, AdapterConfig(), seed=0)
        fill(handle)
        if checkpointing:
            recompute_activations(model)
        model(IDS, labels=IDS).loss.backward()
        found.append([parameter.grad for parameter in handle.parameters("default").values()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_compiled_whole_and_it_notices_every_switch() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    x = torch.randn(3, 9)
    base = model(x)
    handle = attach(model, AdapterConfig(targets=("0", "2")))
    fill(handle)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(model(x), base)
    # a hook on a further layer must be noticed even where nothing else that is guarded changed
    assert not torch._dynamo.config.skip_nnmodule_hook_guards
    with handle.disabled():
        torch.testing.assert_close(compiled(x), base)
    assert attach(compiled, AdapterConfig(targets="0"), "second") is handle
    fill(handle, "second")
    handle.activate({"default": 0.5, "second": 2.0})
    torch.testing.assert_close(compiled(x), model(x))
    with handle.merged():
        torch.testing.assert_close(compiled(x), model(x))
    handle.detach()
    torch.testing.assert_close(compiled(x), base)
    with pytest.raises(AdapterError, match="this model is compiled; attach first"):
        attach(compiled, AdapterConfig(targets="0"))
