"""What the fast path takes over, what it leaves alone, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import COMMON, _make, gemma2, gemma3, gpt2, llama, phi3, qwen3

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.kernels import stand_ins
from sideroad.kernels.fast_path import FastPlan, fast_path, plan_fast_path
from sideroad.kernels.head import find_head
from sideroad.kernels.head_loss import Finish
from sideroad.kernels.isolation import choose_route, packing
from sideroad.kernels.pieces import EAGER
from sideroad.kernels.structure import match_gated, match_norm

SHORT = {"input_ids": torch.arange(1, 6)[None]}


def adapted(make: Callable[..., Any] = llama, **config: Any) -> Any:
    model = make()
    handle = attach(model, AdapterConfig(method=LoraMethod(rank=2, alpha=4), **config), seed=0)
    for path, parameter in handle.parameters("default").items():
        if path.endswith(".B"):
            parameter.data.fill_(0.1)
    return model, handle


def plan(model: Any) -> FastPlan:
    with packing(model, choose_route(model)):
        return plan_fast_path(model, SHORT)


def test_a_llama_is_taken_over_whole() -> None:
    model, _ = adapted()
    found = plan(model)
    assert [len(family) for family in found.families] == [3, 1, 2, 1] * 2
    assert len(found.gated) == len(found.attentions) == 2
    assert len(found.norms) == 5
    assert not found.plain
    assert found.lines() == [
        "fast path: all 14 adapted layers, 2 feed-forward blocks, 5 norms, 2 attentions"
    ]


def test_nothing_is_left_behind_however_the_block_ends() -> None:
    model, handle = adapted()
    before, logits = dict(model.state_dict()), model(**SHORT).logits
    made = plan(model)

    def run() -> None:
        with fast_path(model, made, EAGER):
            assert any("forward" in module.__dict__ for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(**SHORT).logits, logits)
    handle.detach()
    assert model.state_dict().keys() == {name for name in before if ".lora." not in name}


def test_adapters_may_be_switched_inside() -> None:
    model, handle = adapted()
    attach(model, AdapterConfig(method=LoraMethod(rank=3, alpha=4)), "other", seed=1)
    handle.parameters("other")["model.layers.0.self_attn.k_proj.B"].data.fill_(0.3)
    choices: list[Any] = ["default", "other", ["default", "other"], {"default": 0.5}, []]
    with torch.no_grad():
        expected = []
        for choice in choices:
            with handle.using(choice):
                expected.append(model(**SHORT).logits)
        with handle.rows(["default"]):
            by_row = model(**SHORT).logits
        with fast_path(model, plan(model), EAGER):
            for choice, logits in zip(choices, expected, strict=True):
                with handle.using(choice):
                    torch.testing.assert_close(model(**SHORT).logits, logits)
            with handle.rows(["default"]):
                torch.testing.assert_close(model(**SHORT).logits, by_row)
            with handle.disabled():
                torch.testing.assert_close(model(**SHORT).logits, expected[-1])
            handle.detach("default")
            attach(model, AdapterConfig(method=LoraMethod(rank=2, alpha=4)), "default", seed=0)
            for path, parameter in handle.parameters("default").items():
                parameter.data.fill_(0.1) if path.endswith(".B") else None
            with handle.using("default"):
                torch.testing.assert_close(model(**SHORT).logits, expected[0])


def test_a_foreign_hook_keeps_its_module() -> None:
    model, _ = adapted()
    layer = model.model.layers[0]
    seen: list[nn.Module] = []
    for module in (layer.mlp, layer.input_layernorm, layer.self_attn.q_proj):
        module.register_forward_hook(lambda module, _i, _o: seen.append(module))
    found = plan(model)
    assert list(found.gated) == ["model.layers.1.mlp"]
    assert "model.layers.0.input_layernorm" not in found.norms
    assert found.plain == {"model.layers.0.self_attn.q_proj": "carries a forward hook"}
    assert found.lines()[1] == "computed the usual way: model.layers.0.self_attn.q_proj: carries a forward hook"
    seen.clear()
    expected = model(**SHORT).logits
    assert len(seen) == 3
    with fast_path(model, found, EAGER):
        torch.testing.assert_close(model(**SHORT).logits, expected)
    assert len(seen) == 6


def test_reasons_are_told_for_each_layer() -> None:
    model, _ = adapted(gpt2, bias="adapted")
    assert set(plan(model).plain.values()) == {"its bias is trained"}
    model, _ = adapted(targets=("q_proj", "embed_tokens"))
    assert plan(model).plain == {"model.embed_tokens": "is no linear layer (Embedding)"}


def test_siblings_that_get_another_input_compute_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    expected = attention.q_proj(x), attention.k_proj(y), attention.v_proj(x), attention.k_proj(x)
    calls: list[int] = []
    honest = stand_ins.project
    monkeypatch.setattr(stand_ins, "project", lambda x, given: (calls.append(len(given)), honest(x, given))[1])
    with fast_path(model, plan(model), EAGER):
        found = attention.q_proj(x), attention.k_proj(y), attention.v_proj(x), attention.k_proj(x)
    assert calls == [3, 1, 1, 1]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


class TestStructure:
    def test_norms_are_told_by_their_results(self) -> None:
        for model, style in ((llama(), "round_first"), (qwen3(), "round_first"), (gemma3(), "one_plus")):
            norm = match_norm(model.requires_grad_(False).model.norm)
            assert norm is not None
            assert norm.style == style
        assert match_norm(nn.LayerNorm(8).requires_grad_(False)) is None
        assert match_norm(llama().model.norm) is None, "its weight is trained"

    def test_half_precision_norms_round_where_their_module_does(self) -> None:
        model = llama().bfloat16().requires_grad_(False)
        model.model.norm.weight.data.uniform_(0.5, 2)
        norm = match_norm(model.model.norm)
        assert norm is not None
        assert norm.style == "round_first"

    @pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
    def test_activations_are_told_apart(self, act: str) -> None:
        found = match_gated(llama(hidden_act=act).requires_grad_(False).model.layers[0].mlp)
        assert found is not None
        assert found.activation == {"gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
        assert (found.gate, found.up, found.down) == ("gate_proj", "up_proj", "down_proj")

    def test_what_computes_something_else_is_no_gated_block(self) -> None:
        assert match_gated(llama(hidden_act="relu").requires_grad_(False).model.layers[0].mlp) is None
        block = llama().requires_grad_(False).model.layers[0].mlp
        block.extra = nn.Linear(2, 2).requires_grad_(False)
        assert match_gated(block) is None
        assert match_gated(phi3().model.layers[0].mlp) is None


class TestHead:
    @pytest.mark.parametrize(
        ("config", "finish"),
        [
            ("llama", Finish()),
            ("gemma2", Finish(cap=3.0)),
            ("granite", Finish(scale=0.125)),
            ("cohere", Finish(scale=0.0625)),
        ],
    )
    def test_what_follows_the_head_is_found_out(self, config: str, finish: Finish) -> None:
        made = {
            "llama": llama,
            "gemma2": gemma2,
            "granite": lambda: _make(tf.GraniteConfig(**COMMON, logits_scaling=8.0)),
            "cohere": lambda: _make(tf.CohereConfig(**COMMON, logit_scale=0.0625)),
        }[config]().requires_grad_(False)
        head = find_head(made, SHORT)
        assert not isinstance(head, str)
        assert head.finish == finish
        assert "forward" not in head.layer.__dict__

    def test_a_head_that_cannot_be_left_out_says_why(self) -> None:
        model = llama().requires_grad_(False)
        model.lm_head.register_forward_hook(lambda _m, _i, output: output * 2)
        assert find_head(model, SHORT) == "the output head carries a forward hook"
        assert find_head(nn.Linear(2, 2), SHORT) == "Linear names no linear output head"
        model, _ = adapted(modules_to_save=("lm_head",))
        assert find_head(model, SHORT) == "the output head is trained whole"
