"""mixtures: what all-linear says about experts."""

from __future__ import annotations

import logging

import pytest
import torch
from mixtures import Own, mixture
from tiny import tiny_llama
from torch import nn

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.mixtures import mixture_notes
from sideroad.survey import Survey
from sideroad.targets import resolve

ALL = AdapterConfig(method=LoraMethod(rank=2))


def notes(model: nn.Module, config: AdapterConfig = ALL) -> tuple[str, ...]:
    survey = Survey(model)
    return mixture_notes(survey, config, resolve(survey, config)).lines


def test_a_covered_mixture_is_named_with_its_experts() -> None:
    (line,) = notes(mixture("mixtral"))
    assert "model.layers.0.mlp.experts.gate_up_proj and 3 more, one pair for each of 4 experts" in line
    covered, left = notes(mixture("qwen2_moe"))
    assert "covers the fused experts" in covered
    assert left.startswith("all-linear leaves routers frozen: model.layers.0.mlp.shared_expert_gate and 1 more")


def test_nothing_is_said_where_there_is_nothing_to_say() -> None:
    assert notes(tiny_llama()) == ()
    assert notes(mixture("mixtral"), AdapterConfig(targets="q_proj", method=LoraMethod(rank=2))) == ()
    assert notes(nn.ModuleDict({"conv": nn.Conv1d(3, 3, 2), "up": nn.Linear(4, 4)})) == ()


def test_what_is_left_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"own": Own(), "up": nn.Linear(4, 4)})
    packed = torch.zeros(3, 6, 10, dtype=torch.uint8)
    model["own"].experts.register_parameter("gate_proj", nn.Parameter(packed, requires_grad=False))
    assert len(notes(model)) == 2
    assert "leaves out own.experts.gate_proj: stacked weights that are packed" in notes(model)[1]
    del model["own"].experts.num_experts
    with caplog.at_level(logging.WARNING):
        attach(model, ALL)
    assert "all-linear leaves out own.experts.up_proj and 2 more" in caplog.text
