"""Fields and tensors of AdaLoRA's files to those of LoRA."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sideroad.peft_adalora import plain_fields, plain_tensors
from sideroad.peft_format import read_config

FIELDS: dict[str, Any] = {
    "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 8, "target_modules": ["q", "v"],
    "rank_pattern": {"m.q.lora_E": [True, False, True, False], "m.v.lora_E": [False] * 4}, "beta1": 0.85,
    "orth_reg_weight": 0.5,
}  # fmt: skip
ROOT = "base_model.model."


def test_scales_stay_and_ranks_are_those_that_are_left() -> None:
    found = plain_fields(FIELDS)
    reading = read_config(found, {"m.q": 2})
    assert not reading.findings
    s = 8 / (4 + 1e-5)
    assert found["rank_pattern"] == {r"m\.q": 2}
    assert found["alpha_pattern"][r"m\.q"] / 2 == pytest.approx(s, rel=1e-15)
    assert found["lora_alpha"] / found["r"] == pytest.approx(s, rel=1e-15)
    assert found["exclude_modules"] == ["m.v"]
    assert not found.keys() & {"init_r", "target_r", "total_step", "beta1", "orth_reg_weight"}


@pytest.mark.parametrize("said", [None, [], "x.*", ["k"], ""])
def test_layers_without_a_rank_are_excluded_beside_others(said: Any) -> None:
    found = plain_fields({**FIELDS, "exclude_modules": said})["exclude_modules"]
    if isinstance(found, str):
        assert all(re.fullmatch(found, one) for one in ("m.v", "xyz"))
    else:
        assert found == [*(said or []), "m.v"]


def test_other_files_are_left_alone() -> None:
    for fields in ({**FIELDS, "peft_type": "LORA"}, {"r": 4}):
        assert plain_fields(fields) == fields


@pytest.mark.parametrize("name", ["init_r", "lora_alpha", "rank_pattern", "exclude_modules", "target_modules"])
@pytest.mark.parametrize("value", ["x", [], {}, True, -1, 0, 1.5, 10**400, {"a": 1}, {"a": ["x"]}, [1], None, 1e308])
def test_odd_values_are_told_and_never_crash(name: str, value: Any) -> None:
    fields = plain_fields({**FIELDS, name: value})
    reading = read_config(fields, {"m.q": 2})
    assert reading.findings or reading.config.method.kind == "lora"


def test_values_go_into_a_and_what_is_not_whole_keeps_its_names() -> None:
    A, B, E = torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 1)
    whole = {f"{ROOT}q.lora_A": A, f"{ROOT}q.lora_B": B, f"{ROOT}q.lora_E": E}
    gone = {f"{ROOT}v.lora_A": A[:0], f"{ROOT}v.lora_B": B[:, :0], f"{ROOT}v.lora_E": E[:0]}
    lacking = {f"{ROOT}k.lora_A": A, f"{ROOT}k.lora_E": E}
    other = {f"{ROOT}head.weight": B}
    found = plain_tensors({**whole, **gone, **lacking, **other})
    assert found.keys() == {f"{ROOT}q.lora_A.weight", f"{ROOT}q.lora_B.weight", *lacking, *other}
    assert torch.equal(found[f"{ROOT}q.lora_A.weight"], A * E)
    assert torch.equal(found[f"{ROOT}q.lora_B.weight"], B)
