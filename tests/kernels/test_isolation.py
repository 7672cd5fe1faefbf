"""The probe says yes where packed sequences are kept apart, no where they are not, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO, gemma2, llama, opt

from sideroad.base import BaseConfig, load_base
from sideroad.kernels import isolation
from sideroad.kernels.isolation import PackingRoute, choose_route, packing, probe_isolation
from sideroad.kernels.packed_attention import is_installed

SEGMENTS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "opt"]


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_are_used_where_they_are_right(name: str) -> None:
    model = ZOO[name]()
    route = choose_route(model)
    assert route == PackingRoute("segments", "")
    with packing(model, route):
        assert probe_isolation(model) is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_16_bits_is_not_taken_for_a_leak(dtype: torch.dtype) -> None:
    model = llama(num_hidden_layers=30, initializer_range=0.3).to(dtype)
    assert choose_route(model) == PackingRoute("segments", "")


@pytest.mark.all
def test_the_quick_starts_model_is_packed_in_bf16() -> None:
    base = load_base(BaseConfig(model="smollm2-135m-instruct"), dtype=torch.bfloat16)
    assert choose_route(base.model) == PackingRoute("segments", "")


def test_a_soft_capped_model_takes_the_mask() -> None:
    route = choose_route(gemma2())
    assert (route.kind, route.isolates) == ("mask", True)
    assert route.reason == "Gemma2ForCausalLM runs 'eager' attention; only 'sdpa' is replaced"


def test_eager_attention_takes_the_mask() -> None:
    assert choose_route(llama(attn_implementation="eager")).kind == "mask"


@pytest.mark.parametrize("name", ["bloom", "mamba", "gpt_oss"])
def test_a_model_that_mixes_sequences_is_refused(name: str) -> None:
    reason = probe_isolation(ZOO[name]())
    assert reason is not None
    assert "lets packed sequences see each other" in reason
    assert not choose_route(ZOO[name]()).isolates


def test_the_answer_is_for_the_route_in_force() -> None:
    """transformers' OPT makes its block mask without looking at positions: only segments keep sequences apart."""
    model = opt()
    assert "see each other" in (probe_isolation(model) or "")
    with packing(model, PackingRoute("segments", "")):
        assert probe_isolation(model) is None


def test_a_model_that_ignores_positions_is_refused() -> None:
    learned = ZOO["gpt2"]()
    plain = learned.transformer.wpe.forward
    learned.transformer.wpe.forward = lambda positions: plain(torch.arange(positions.shape[1])[None])
    reason = probe_isolation(learned)
    assert reason is not None
    assert "differently from the same one alone" in reason


def test_extra_attention_arguments_send_a_model_to_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    for layer in model.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, plain=plain, **k: plain(*a, **k, novelty=1)
    route = choose_route(model)
    assert route.kind == "mask"
    assert "LlamaAttention passes novelty to its attention" in route.reason


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, **arguments: Any) -> None:
        raise IndexError("no such row\nsecond line")


def test_a_model_that_raises_is_refused_with_its_words() -> None:
    assert probe_isolation(Raises()) == "Raises cannot run a packed row: IndexError: no such row"


def test_a_model_with_broken_weights_is_refused() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    assert "not finite" in (probe_isolation(model) or "")


def test_mode_gradients_and_random_state_are_left_alone() -> None:
    model = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    choose_route(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_is_small() -> None:
    model, tokens = llama(), []
    model.register_forward_pre_hook(lambda _m, _a, k: tokens.append(k["input_ids"].numel()), with_kwargs=True)
    choose_route(model)
    assert len(tokens) <= 5
    assert sum(tokens) <= 3 * sum(isolation._LENGTHS)


def test_a_route_is_in_force_only_inside_its_block() -> None:
    model = llama()
    with packing(model, PackingRoute("mask", "because")):
        assert not is_installed(model)
    with packing(model, PackingRoute("segments", "")):
        assert is_installed(model)
    assert not is_installed(model)
