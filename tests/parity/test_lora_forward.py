"""The same tensors in PEFT and here give the same logits, gradients and merged weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.targets import resolve

# PEFT asks for transformers' old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.arange(2 * 9).reshape(2, 9) * 7 % 97


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    fields = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**fields)).eval()


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    fields = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**fields, intermediate_size=64)).eval()


CASES: dict[str, tuple[Any, dict[str, Any], AdapterConfig]] = {
    "plain": (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}, AdapterConfig(targets=("q_proj", "v_proj"))),
    "rslora": (
        tiny_llama,
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        AdapterConfig(targets=("q_proj", "down_proj"), method=LoraMethod(scaling="alpha/sqrt(r)")),
    ),
    "patterns": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"o_proj": 3, "layers.1.self_attn.q_proj": 7},
            "use_rslora": True,
        },
        AdapterConfig(
            targets=("q_proj", "o_proj", "up_proj"),
            method=LoraMethod(scaling="alpha/sqrt(r)"),
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5},
            alpha_pattern={"o_proj": 3, "layers.1.self_attn.q_proj": 7},
        ),
    ),
    "conv1d": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        AdapterConfig(targets=("c_attn", "c_proj")),
    ),
    "bias of adapted layers": (
        tiny_gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
        AdapterConfig(targets=("c_attn",), bias="adapted"),
    ),
}


def both(case: str) -> tuple[Any, Attached]:
    make, theirs, ours = CASES[case]
    model = make()
    peft_model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, lora_alpha=16, **theirs))
    handle = attach(model, ours, seed=5)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in handle.parameters("default").values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    paired = pair_up(peft_model, handle)
    assert paired
    with torch.no_grad():
        for name, parameter in handle.parameters("default").items():
            paired[name].copy_(parameter)
    return peft_model, handle


def pair_up(peft_model: Any, handle: Attached) -> dict[str, Tensor]:
    parts = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "bias": "base_layer.bias"}
    theirs = dict(peft_model.named_parameters())
    names = [name.rpartition(".") for name in handle.parameters("default")]
    return {f"{path}.{part}": theirs[f"base_model.model.{path}.{parts[part]}"] for path, _, part in names}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_equal(case: str) -> None:
    peft_model, handle = both(case)
    ours, theirs = handle.model(IDS).logits, peft_model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    paired = pair_up(peft_model, handle)
    for name, parameter in handle.parameters("default").items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, paired[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(paired)


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_equal(case: str) -> None:
    peft_model, handle = both(case)
    theirs = dict(peft_model.merge_and_unload().state_dict())
    ours = handle.merge_and_unload().state_dict()
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_all_linear_means_the_same_layers(make: Any) -> None:
    task = "SEQ_CLS" if make is tiny_bert else "CAUSAL_LM"
    fields: dict[str, Any] = {"fan_in_fan_out": True} if make is tiny_gpt2 else {}
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules="all-linear", task_type=task, **fields))
    theirs = {name.removeprefix("base_model.model.") for name, one in model.named_modules() if hasattr(one, "lora_A")}
    assert set(resolve(make(), AdapterConfig())) == theirs


def test_initial_distribution_is_pefts() -> None:
    for init, option in (("kaiming", True), ("gaussian", "gaussian")):
        wide = nn.Sequential(nn.Linear(4000, 64))
        method = LoraMethod.model_validate({"init": init, "rank": 16})
        ours = attach(copy.deepcopy(wide), AdapterConfig(targets=("0",), method=method), seed=0).parameters("default")
        theirs = peft.get_peft_model(
            wide, peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=option)
        ).base_model.model[0].lora_A["default"].weight  # fmt: skip
        # the second moment gives the width, its ratio to the mean of |A| the shape (uniform 1.155, Gaussian 1.253)
        for statistic in (torch.std, lambda A: A.std() / A.abs().mean()):
            torch.testing.assert_close(statistic(ours["0.A"]), statistic(theirs), rtol=0.02, atol=0)
