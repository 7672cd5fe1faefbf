"""Files of attention's projections both ways: PEFT has one rank and one alpha for an attention with its output."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fill
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, TargetError

peft = pytest.importorskip("peft")

X = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.up = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.config = {"model_type": "custom"}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.attention(x, x, x)[0])
        return out


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


PATTERNS = [
    {},
    {"alpha_pattern": {"attention": 20}},
    {"alpha_pattern": {"out_proj": 20}},
    {"rank_pattern": {"attention": 4}},
    {"rank_pattern": {"out_proj": 4}, "alpha_pattern": {"up": 1, "attention": 3}},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_theirs_act_here_as_there_and_come_back_the_same(patterns: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["attention", "up"], r=2, lora_alpha=4, **patterns)
    theirs = peft.get_peft_model(Model(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.3)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    value = Adapter.load(tmp_path / "theirs")
    mine = Model()
    handle = attach(mine, value)
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-5, atol=1e-5)
    handle.adapter("default").save(tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "mine").eval()
    torch.testing.assert_close(again(X), theirs(X), rtol=1e-5, atol=1e-5)


OURS = [
    {},
    {"rank_pattern": {"attention": 4, "out_proj": 4}},
    {"alpha_pattern": {"*attention*": 20}},
    {"targets": ("out_proj", "up"), "alpha_pattern": {"out_proj": 20}},
    {"targets": ("out_proj", "up"), "rank_pattern": {"out_proj": 4}},
    {"targets": ("attention",), "alpha_pattern": {"attention": 20}},
]


@pytest.mark.parametrize("fields", OURS, ids=str)
def test_ours_act_there_as_here(fields: dict[str, Any], tmp_path: Path) -> None:
    both = {"targets": ("attention", "out_proj", "up"), "method": LoraMethod(rank=2, alpha=4)}
    mine = Model()
    handle = attach(mine, AdapterConfig(**{**both, **fields}))
    fill(handle, size=0.3)
    replace(handle.adapter("default"), task_type=None).save(tmp_path / "mine")
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "mine").eval()
    torch.testing.assert_close(theirs(X), mine(X), rtol=1e-5, atol=1e-5)
    (tmp_path / "mine" / "sideroad.json").unlink(missing_ok=True)
    plain = Model()
    attach(plain, Adapter.load(tmp_path / "mine"))
    assert torch.equal(plain(X), mine(X))


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"out_proj": 4}}, {"alpha_pattern": {"attention": 9}}], ids=str)
def test_numbers_that_no_file_can_say_are_refused_before_and_after(pattern: Any, tmp_path: Path) -> None:
    fields = {"targets": ("attention", "out_proj"), "method": LoraMethod(rank=2, alpha=4)}
    words = "attention and attention.out_proj have ranks 2 and [24], alpha [49] and 4; PEFT's files have one of each"
    with pytest.raises(TargetError, match=words):
        attach(Model(), AdapterConfig(**fields, **pattern))
    value = attach(Model(), AdapterConfig(**fields)).adapter("default")
    if "alpha_pattern" in pattern:
        with pytest.raises(AdapterError, match=words):
            replace(value, config=value.config.model_copy(update=pattern)).save(tmp_path / "a")
        assert not (tmp_path / "a").exists()
