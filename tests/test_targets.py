"""targets: one pattern language, everything that is wrong in one error."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IDS, tiny_llama
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import TargetError
from sideroad.targets import bias_paths, count_values, matches, resolve, shortest_names

MATCHES = [
    ("q_proj", "model.layers.0.self_attn.q_proj", True),
    ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
    ("proj", "model.layers.0.self_attn.q_proj", False),
    ("q_proj", "q_proj", True),
    ("q_proj", "q_proj.lora", False),
    ("*.q_proj", "model.layers.0.self_attn.q_proj", True),
    ("*.q_proj", "q_proj", False),
    ("*layers.1?.mlp*", "model.layers.12.mlp.up_proj", True),
    ("*layers.1?.mlp*", "model.layers.2.mlp.up_proj", False),
    ("*.[qv]_proj", "a.v_proj", True),
    ("*.[qv]_proj", "a.k_proj", False),
    ("re:.*\\.(q|v)_proj", "a.v_proj", True),
    ("re:v_proj", "a.v_proj", False),
    ("Q_PROJ", "a.q_proj", False),
]


@pytest.mark.parametrize(("pattern", "path", "expected"), MATCHES)
def test_matches(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def error(model: nn.Module | None = None, **fields: Any) -> str:
    with pytest.raises(TargetError) as caught:
        resolve(model or tiny_llama(), AdapterConfig(**fields))
    return str(caught.value)


def leaves(**fields: Any) -> list[str]:
    return [path.removeprefix("model.layers.") for path in resolve(tiny_llama(), AdapterConfig(**fields))]


def test_all_linear_leaves_the_head() -> None:
    found = resolve(tiny_llama(), AdapterConfig())
    assert len(found) == 14
    assert "lm_head" not in found
    target = found["model.layers.0.self_attn.k_proj"]
    assert (target.out_features, target.in_features, target.rank, target.alpha) == (16, 32, 8, 16.0)
    assert "lm_head" in resolve(tiny_llama(), AdapterConfig(targets=("all-linear", "lm_head")))


def test_head_by_structure_and_by_name() -> None:
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForSequenceClassification(BertConfig(**fields, vocab_size=32))
    assert all(path.startswith("bert.") for path in resolve(bert, AdapterConfig()))
    plain = nn.ModuleDict({"body": nn.Sequential(nn.Linear(9, 9)), "classifier": nn.Linear(9, 9)})
    assert list(resolve(plain, AdapterConfig())) == ["body.0"]


def test_exclude_layers_and_patterns() -> None:
    assert leaves(targets="q_proj", layers="1") == ["1.self_attn.q_proj"]
    assert leaves(targets="q_proj", layers=(0,), layers_pattern="layers") == ["0.self_attn.q_proj"]
    assert leaves(targets="*self_attn*", exclude=("k_proj", "*.0.*")) == [f"1.self_attn.{x}_proj" for x in "qvo"]
    assert len(leaves(layers="0-")) == 14
    found = resolve(tiny_llama(), AdapterConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"*.0.*q_proj": 3.0}))
    assert [(t.rank, t.alpha) for path, t in found.items() if "q_proj" in path] == [(2, 3.0), (2, 16.0)]


def test_near_miss_is_named() -> None:
    assert error(targets="q_projj") == (
        'target "q_projj" matches no layer of LlamaForCausalLM.\n'
        "  Layers found: embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head.\n"
        '  Did you mean "q_proj"?'
    )


def test_everything_wrong_at_once() -> None:
    text = error(targets=("q_proj", "nope", "re:(", "*.nothing"), exclude=("k_prj",), layers="1-5,x")
    assert 'pattern "re:(" is not a regular expression' in text
    text = error(targets=("q_proj", "nope", "*.nothing"), exclude=("k_prj", "mlp"), layers="1-5,x")
    for part in (
        "targets of LlamaForCausalLM: 6 problems",
        'target "nope" matches no layer',
        'target "*.nothing" matches no layer',
        'exclude "k_prj" matches no layer',
        'Did you mean "k_proj"?',
        'exclude "mlp" names no layer but LlamaMLP',
        '"x" is not a range; write 5, 0-3 or 10-',
        "layers asks for 2-5, but LlamaForCausalLM has blocks 0-1 only",
    ):
        assert part in text


def test_what_cannot_be_adapted_is_named() -> None:
    assert list(resolve(tiny_llama(), AdapterConfig(targets="embed_tokens"))) == ["model.embed_tokens"]
    text = error(targets=("q_proj", "mlp", "*norm*"))
    assert 'target "mlp" means 2 x LlamaMLP (model.layers.0.mlp, …)' in text
    assert "5 x LlamaRMSNorm" in text
    assert "allowed: nn.Linear, Conv1D, nn.Embedding, nn.Conv1d/2d/3d and the projections" in text


def test_patterns_that_no_target_uses() -> None:
    text = error(targets="q_proj", rank_pattern={"k_proj": 2}, alpha_pattern={"q_porj": 2.0})
    assert 'rank_pattern "k_proj" matches none of the adapted layers' in text
    assert 'alpha_pattern "q_porj" matches none' in text
    assert 'Did you mean "q_proj"?' in text


def test_rank_larger_than_the_layer() -> None:
    text = error(targets=("q_proj", "k_proj"), method=LoraMethod(rank=20))
    assert text.startswith("rank 20 is larger than k_proj (2 layers of LlamaForCausalLM, [out, in] = [16, 32]); ")
    assert "largest rank there is 16" in text
    assert len(resolve(tiny_llama(), AdapterConfig(method=LoraMethod(rank=16), targets="k_proj"))) == 2


def test_layers_need_a_block_list_and_something_left() -> None:
    flat = nn.ModuleDict({"one": nn.Linear(9, 9)})
    assert "no layer of ModuleDict is inside a numbered list" in error(flat, layers="0")
    assert 'inside a block list named "blocks"' in error(layers="0", layers_pattern="blocks")
    assert "layers_pattern is set without layers" in error(layers_pattern="layers")
    assert "blocks are counted from 0" in error(layers=(-1,))
    assert '"3-1" is not a range' in error(layers="3-1")
    assert "asks for 7" in error(layers="7-")
    assert "left to adapt after exclude and layers" in error(targets="q_proj", exclude=("q_proj",))


def test_bias_options() -> None:
    assert 'bias is "all", but no layer of LlamaForCausalLM has a bias; set bias: none' in error(bias="all")
    model = nn.ModuleDict({"up": nn.Linear(9, 9), "down": nn.Linear(9, 9, bias=False), "norm": nn.LayerNorm(9)})
    wide = AdapterConfig(targets="up", bias="all")
    assert bias_paths(model, wide, ["up"]) == ("up", "norm")
    assert bias_paths(model, wide.model_copy(update={"bias": "adapted"}), ["up", "down"]) == ("up",)
    assert bias_paths(model, wide.model_copy(update={"exclude": ("norm",)}), ["up"]) == ("up",)
    assert "no adapted layer" in error(model, targets="down", bias="adapted")
    model["conv"] = nn.Conv1d(2, 2, 1)
    assert bias_paths(model, wide, ["up"]) == ("up", "norm", "conv")
    model["channels"] = nn.BatchNorm1d(2)
    assert bias_paths(model, wide, ["up"]) == ("up", "norm", "conv", "channels")
    model["two"] = nn.Bilinear(2, 2, 2)
    assert "these biases cannot be trained: two (Bilinear)" in error(model, targets="up", bias="all")
    assert resolve(model, AdapterConfig(targets="up", bias="all", exclude=("two",)))
    assert resolve(model, AdapterConfig(targets="up", bias="all", modules_to_save=("two",)))


def test_shared_module_counts_once() -> None:
    layer = nn.Linear(9, 9)
    model = nn.ModuleDict({"first": layer, "second": layer})
    assert list(resolve(model, AdapterConfig())) == ["first"]
    assert list(resolve(model, AdapterConfig(targets="second"))) == ["first"]


def test_attached_adapters_are_not_looked_at() -> None:
    model = tiny_llama()
    before = resolve(model, AdapterConfig(targets="*"))
    attach(model, AdapterConfig())
    assert resolve(model, AdapterConfig(targets="*")) == before
    assert 'target "lora" matches no layer' in error(model, targets="lora")


def test_seven_billion_on_meta_in_a_second() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    attach(tiny_llama(), AdapterConfig())  # the first attach imports the compiler's settings
    started = time.process_time()
    handle = attach(model, AdapterConfig(), seed=0)
    assert time.process_time() - started < 1.0
    assert sum(parameter.numel() for parameter in handle.parameters("default").values()) == 19_988_480
    assert all(parameter.is_meta for parameter in handle.parameters("default").values())


part = st.sampled_from(["a", "b", "0", "1"])
path = st.lists(part, min_size=1, max_size=4).map(".".join)


@settings(max_examples=100)
@given(everything=st.sets(path, min_size=1, max_size=12), data=st.data())
def test_shortest_names_mean_exactly_the_paths(everything: set[str], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(everything)), min_size=1))
    names = shortest_names(sorted(chosen), sorted(everything))
    assert {one for one in everything if any(matches(name, one) for name in names)} == chosen
    assert len(names) <= len(chosen)


def test_shortest_names_are_short() -> None:
    paths = [f"model.layers.{block}.{leaf}" for block in range(3) for leaf in ("q", "k")]
    assert shortest_names([p for p in paths if p.endswith("q")], paths) == ("q",)
    assert shortest_names(["model.layers.1.q"], paths) == ("1.q",)
    assert shortest_names(["q"], ["q", "a.q"]) == ("re:q",)


@pytest.mark.parametrize(
    "method",
    [
        {"rank": 4},
        {"kind": "dora", "rank": 4},
        {"kind": "dora", "rank": 4, "init": "olora"},
        {"rank": 4, "trains": "B"},
        {"rank": 4, "trains": "B", "init": "pissa"},
        {"rank": 4, "init": "pissa-fast"},
        {"rank": 4, "init": {"kind": "lora-ga", "batches": 1}},
        {"kind": "adalora", "rank": 4, "target_rank": 2},
    ],
    ids=str,
)
def test_counts_are_those_of_the_attached_adapter_and_of_its_file(method: dict[str, Any]) -> None:
    config = AdapterConfig(method=method, rank_pattern={"up_proj": 2})  # type: ignore[arg-type]
    model = tiny_llama()
    targets = resolve(model, config)
    batches = [{"input_ids": IDS, "labels": IDS}] if "lora-ga" in str(method) else None
    handle = attach(model, config, seed=0, batches=batches)
    parameters = handle.parameters("default")
    kept = method.get("target_rank", 4) / 4
    for name, parameter in parameters.items():
        if name.endswith(".E"):
            parameter.data[: round(kept * len(parameter))] = 1.0
    value = handle.adapter("default").folded()
    for path, target in targets.items():
        counts = count_values(target, config)
        assert counts.trained == sum(one.numel() for name, one in parameters.items() if name.startswith(f"{path}."))
        assert counts.stored == sum(one.numel() for one in value.weights[path].values())
        assert counts.wide == (target.out_features if method.get("kind") == "dora" else 0)


def test_slices_are_counted_as_they_train_and_as_files_spread_them() -> None:
    model = nn.Sequential(nn.Linear(6, 12))
    config = AdapterConfig(targets=("0",), slices={"0": (True, False, True)}, method=LoraMethod(rank=2))
    handle = attach(model, config, seed=0)
    counts = count_values(resolve(nn.Sequential(nn.Linear(6, 12)), config)["0"], config)
    assert counts.trained == sum(one.numel() for one in handle.parameters("default").values())
    assert counts.stored == handle.adapter("default").folded().parameters


def test_lora_ga_wants_two_directions_for_each_rank() -> None:
    message = error(method=LoraMethod(rank=9, init="lora-ga"))  # type: ignore[arg-type]
    assert "lora-ga takes 2 x rank directions, so its rank can be 8 at most, found 9" in message
    assert "k_proj (2 layers of LlamaForCausalLM, [out, in] = [16, 32])" in message
    assert "q_proj" not in message
    assert "lora-ga" not in error(method=LoraMethod(rank=40, init="lora-ga"))  # type: ignore[arg-type]
    resolve(tiny_llama(), AdapterConfig(method=LoraMethod(rank=8, init="lora-ga")))  # type: ignore[arg-type]
