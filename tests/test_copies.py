"""copies: whole weights that PEFT saved unasked are dropped, honoured or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.copies import settle_copies
from sideroad.errors import AdapterError
from sideroad.peft_keys import BASE
from sideroad.survey import Survey

EMBED, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"


def value(**changes: Any) -> Adapter:
    config = AdapterConfig(**{"targets": Q, "method": LoraMethod(rank=2), **changes})
    handle = attach(tiny_llama(), config)
    fill(handle)
    return handle.adapter("default")


def with_copy(one: Adapter, path: str, weight: Tensor) -> Adapter:
    weights = {**one.weights, path: {**one.weights.get(path, {}), BASE: weight}}
    return replace(one, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_s_own_weights_are_dropped_in_either_type(dtype: torch.dtype) -> None:
    model: Any = tiny_llama()
    one = with_copy(with_copy(value(), EMBED, model.model.embed_tokens.weight.to(dtype)), Q,
                    model.get_submodule(Q).weight.to(dtype))  # fmt: skip
    settled, problems = settle_copies(Survey(model), one)
    assert problems == []
    assert settled.same_weights(value())
    assert settled.modules == {}
    handle = attach(model, one)
    assert handle.paths("default") == (Q,)
    twin = tiny_llama()
    attach(twin, value())
    assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_another_weight_replaces_the_layer_s() -> None:
    model, other = tiny_llama(), tiny_llama(seed=1)
    one = with_copy(value(), HEAD, other.lm_head.weight.detach())
    handle = attach(model, one)
    assert handle.paths("default") == (Q, HEAD)
    twin: Any = tiny_llama()
    attach(twin, value())
    twin.lm_head.weight.data.copy_(other.lm_head.weight)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    handle.load("default", one)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_another_weight_of_a_tied_pair_replaces_both() -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    weight = torch.randn(259, 32)
    attach(model, with_copy(value(), EMBED, weight))
    twin: Any = tiny_llama(tie_word_embeddings=True)
    attach(twin, value())
    twin.lm_head.weight.data.copy_(weight)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_rows_trained_in_another_weight_act_in_their_place() -> None:
    one = value(trainable_tokens={"embed_tokens": (3, 250)})
    weight = torch.randn(259, 32)
    model: Any = tiny_llama()
    handle = attach(model, with_copy(one, EMBED, weight))
    expected = weight.clone()
    expected[[3, 250]] = one.weights[EMBED]["rows"]
    with handle.merged():
        assert torch.equal(model.model.embed_tokens.weight, expected)
    same: Any = tiny_llama()
    attach(same, with_copy(one, EMBED, same.model.embed_tokens.weight.detach()))
    plain: Any = tiny_llama()
    attach(plain, one)
    assert torch.equal(same(IDS).logits, plain(IDS).logits)


def test_what_cannot_be_honoured_is_refused_by_attach_and_by_load() -> None:
    other = with_copy(value(), Q, torch.randn(32, 32))
    words = r"q_proj: holds a copy of the base's weight beside its pair, which is not this base's: made for another"
    with pytest.raises(AdapterError, match=words):
        attach(tiny_llama(), other)
    handle = attach(tiny_llama(), value())
    before = {name: one.clone() for name, one in handle.parameters("default").items()}
    with pytest.raises(AdapterError, match=words):
        handle.load("default", other)
    assert all(torch.equal(one, before[name]) for name, one in handle.parameters("default").items())
    with pytest.raises(AdapterError, match="has a whole weight in the file, but no such layer is in the model"):
        attach(tiny_llama(), with_copy(value(), "model.wte", torch.ones(2, 2)))


def test_a_grown_vocabulary_says_how_to_make_room() -> None:
    grown = with_copy(with_copy(value(), EMBED, torch.randn(300, 32)), HEAD, torch.randn(300, 32))
    words = r"\[300, 32\]; the model has \[259, 32\]; call resize_token_embeddings\(300\)"
    with pytest.raises(AdapterError, match=words):
        attach(tiny_llama(), grown)
    model = tiny_llama()
    model.resize_token_embeddings(300)
    attach(model, grown)


def test_on_the_meta_device_nothing_can_be_compared() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    settled, problems = settle_copies(Survey(model), with_copy(value(), EMBED, torch.randn(259, 32)))
    assert problems == []
    assert EMBED not in settled.weights
