"""fitting: an adapter for another model is refused, with everything that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from sideroad.adapter import Adapter, BaseRecord
from sideroad.attaching import attach, attached
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.peft_keys import PEFT_CONVOLUTION

Q0, Q1 = (f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))


def value() -> Adapter:
    made = attach(tiny_llama(), AdapterConfig(targets="q_proj"), seed=0).adapter("default")
    return replace(made, base=BaseRecord(name="tiny-llama"))


def refused(adapter: Adapter, model: nn.Module | None = None) -> str:
    model = model or tiny_llama()
    before = list(model.state_dict())
    with pytest.raises(AdapterError) as caught:
        attach(model, adapter, "mine")
    assert list(model.state_dict()) == before
    assert attached(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(caught.value)


def test_adapter_for_a_wider_base() -> None:
    text = refused(value(), tiny_llama(hidden_size=48, num_attention_heads=4))
    assert text.startswith(
        'adapter "mine" (made for "tiny-llama") does not fit this LlamaForCausalLM: is it an adapter'
    )
    assert f"{Q0} and 1 more like it ({Q1}): has A of shape [8, 32]; the layer needs [8, 48]" in text
    assert "has B of shape [32, 8]; the layer needs [48, 8]" in text


def test_adapter_for_another_architecture() -> None:
    one = value()
    renamed = {path.replace("self_attn", "attention"): parts for path, parts in one.weights.items()}
    text = refused(replace(one, weights=renamed, base=None))
    assert "made for an unknown base" in text
    assert "model.layers.0.attention.q_proj" in text
    assert f'does not exist in the model. Did you mean "{Q0}"?' in text


def test_every_kind_of_problem_at_once() -> None:
    one = value()
    pair = one.weights[Q0]
    weights = {
        Q0: {"A": pair["A"], "magnitude": torch.ones(32)},
        "model.embed_tokens": {"A": pair["A"], "B": pair["B"]},
        "model.norm": dict(pair),
        "model.layers.0.self_attn.v_proj": {"bias": torch.ones(3)},
        "model.layers.0.self_attn.k_proj": {},
    }
    text = refused(replace(one, weights=weights))
    for part in (
        "8 problems",
        "has unknown tensors magnitude; allowed: A, B, bias",
        "has A but lacks B",
        "model.embed_tokens: has A of shape [8, 32]; the layer needs [8, 259] for rank 8",
        "model.norm: is a LlamaRMSNorm, which cannot be adapted",
        "v_proj: has a bias in the adapter, but this Linear has none that can be trained",
        "k_proj: has no tensors",
        f"{Q1}: has no tensors, but targets q_proj mean it",
    ):
        assert part in text, part


def test_bias_of_another_shape() -> None:
    model = nn.Sequential(nn.Linear(9, 9))
    one = attach(nn.Sequential(nn.Linear(9, 9)), AdapterConfig(targets="0", bias="adapted")).adapter("default")
    wrong = {"0": {**one.weights["0"], "bias": torch.ones(3)}}
    assert "has a bias of shape [3]; the layer needs [9]" in refused(replace(one, weights=wrong), model)


def test_empty_adapter() -> None:
    assert "it has no tensors at all" in refused(replace(value(), weights={}))


def test_ranks_come_from_the_tensors() -> None:
    one = value()
    small = {path: {"A": parts["A"][:2], "B": parts["B"][:, :2]} for path, parts in one.weights.items()}
    handle = attach(tiny_llama(), replace(one, weights=small))
    assert handle.parameters("default")[f"{Q0}.A"].shape == (2, 32)


def test_alias_of_a_shared_module_is_placed() -> None:
    def shared() -> nn.Module:
        layer = nn.Linear(9, 9)
        return nn.ModuleDict({"first": layer, "second": layer})

    one = attach(shared(), AdapterConfig(targets="first")).adapter("default")
    assert one.config.targets == ("first",)
    moved = replace(one, weights={"second": one.weights["first"]})
    assert attach(shared(), moved).paths("default") == ("first",)
    both = replace(one, weights={"first": one.weights["first"], "second": one.weights["first"]})
    assert "second: is the same module as another path of this adapter" in refused(both, shared())


def test_the_value_is_not_aliased() -> None:
    one = value()
    handle = attach(tiny_llama(), one)
    with torch.no_grad():
        handle.parameters("default")[f"{Q0}.A"].zero_()
    assert one.weights[Q0]["A"].any()


def test_a_pair_made_for_another_kind_of_layer() -> None:
    square = attach(nn.Sequential(nn.Embedding(9, 9)), AdapterConfig(targets="0")).adapter("default")
    text = refused(square, nn.Sequential(nn.Linear(9, 9)))
    assert "0: has a pair that was made for an embedding, but this Linear is not one" in text
    linear = attach(nn.Sequential(nn.Linear(9, 9)), AdapterConfig(targets="0")).adapter("default")
    text = refused(linear, nn.Sequential(nn.Embedding(9, 9)))
    assert "0: has a pair that was made for another kind of layer, but this Embedding is an embedding" in text


@pytest.mark.parametrize("geometry", [{"dilation": 2}, {"padding_mode": "reflect", "padding": 1}], ids=str)
def test_peft_s_pair_on_a_convolution_whose_geometry_it_does_not_know(geometry: dict[str, object]) -> None:
    made = attach(nn.Sequential(nn.Conv1d(9, 9, 3)), AdapterConfig(targets="0")).adapter("default")
    theirs = replace(made, kinds={"0": PEFT_CONVOLUTION})
    text = refused(theirs, nn.Sequential(nn.Conv1d(9, 9, 3, **geometry)))  # type: ignore[arg-type]
    assert "0: has a pair of PEFT, which trains A without dilation and padding mode; this Conv1d has them" in text
    handle = attach(nn.Sequential(nn.Conv1d(9, 9, 3, **geometry)), made)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="trains A without dilation and padding mode"):
        handle.load("default", theirs)
    attach(nn.Sequential(nn.Conv1d(9, 9, 3, stride=2, padding=1)), theirs)
