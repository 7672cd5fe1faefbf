"""Encoders, encoder-decoders and vision models: trained, merged, saved, loaded and read by PEFT."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from torch import Tensor, nn
from transformers import PreTrainedModel

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod

peft = pytest.importorskip("peft")

CASES = [
    (name, choice)
    for name, architecture in ARCHITECTURES.items()
    for choice in ("all-linear", "every layer")
    if choice == "every layer" or architecture.all_linear
]


def config_of(case: tuple[str, str]) -> AdapterConfig:
    """Every layer includes embeddings, convolutions and heads; a depthwise convolution has no rank above 1."""
    name, choice = case
    if choice == "all-linear":
        return AdapterConfig(method=LoraMethod(rank=4))
    return AdapterConfig(targets="*", exclude=ARCHITECTURES[name].uncalled, method=LoraMethod(rank=1))


@dataclass
class Trained:
    """A model whose adapter has learned for ten steps."""

    architecture: Architecture
    config: AdapterConfig
    handle: Attached
    losses: list[float]
    before: dict[str, Tensor]
    start: dict[str, Tensor]


def logits_of(model: nn.Module, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        out: Any = model(**architecture.batch)
    return out["logits"] if "logits" in out else out["logits_per_image"]


def train(case: tuple[str, str], steps: int = 10) -> Trained:
    architecture = ARCHITECTURES[case[0]]
    model = architecture.build()
    before = copy.deepcopy(model.state_dict())
    handle = attach(model, config_of(case), seed=0)
    parameters = handle.parameters("default")
    start = {path: one.detach().clone() for path, one in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**architecture.batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(architecture, config_of(case), handle, losses, before, start)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def one(request: pytest.FixtureRequest) -> Trained:
    return train(request.param)


def read_by_peft(architecture: Architecture, path: Path) -> Tensor:
    return logits_of(peft.PeftModel.from_pretrained(architecture.build(), path).eval(), architecture)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {path: tensor for path, tensor in model.state_dict().items() if ".lora." not in f".{path}"}


def same_bytes(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = base_state(model)
    return list(now) == list(before) and all(torch.equal(tensor, before[path]) for path, tensor in now.items())


def test_training_changes_the_adapter_alone_and_lowers_the_loss(one: Trained) -> None:
    assert same_bytes(one.handle.model, one.before)
    still = [path for path, now in one.handle.parameters("default").items() if torch.equal(now, one.start[path])]
    assert not still
    assert one.losses[-1] < 0.9 * one.losses[0]


def test_merged_equals_unmerged_and_unmerging_gives_the_bytes_back(one: Trained) -> None:
    model, handle = one.handle.model, one.handle
    apart = logits_of(model, one.architecture)
    with handle.disabled():
        base = logits_of(model, one.architecture)
    assert torch.equal(base, logits_of(one.architecture.build(), one.architecture))
    assert (apart - base).abs().max() > 1e-2 * base.abs().max()
    handle.merge()
    merged = logits_of(model, one.architecture)
    assert torch.dist(merged, apart) <= 1e-5 * apart.norm()
    assert not same_bytes(model, one.before)
    handle.unmerge()
    assert same_bytes(model, one.before)
    assert torch.equal(logits_of(model, one.architecture), apart)


def test_saved_and_loaded_on_a_fresh_base(one: Trained, tmp_path: Path) -> None:
    one.handle.adapter("default").save(tmp_path / "adapter")
    again = attach(one.architecture.build(), Adapter.load(tmp_path / "adapter"))
    assert torch.equal(logits_of(again.model, one.architecture), logits_of(one.handle.model, one.architecture))


def test_peft_reads_the_file(one: Trained, tmp_path: Path) -> None:
    one.handle.adapter("default").save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if one.architecture.peft_fails and "*" in one.config.targets:
            with pytest.raises((AttributeError, RuntimeError, ValueError), match=one.architecture.peft_fails):
                read_by_peft(one.architecture, tmp_path / "adapter")
            return
        found = read_by_peft(one.architecture, tmp_path / "adapter")
    wanted = logits_of(one.handle.model, one.architecture)
    assert torch.dist(found, wanted) <= 1e-5 * wanted.norm()


def test_the_merged_model_is_saved_and_loaded_without_sideroad(one: Trained, tmp_path: Path) -> None:
    copied = attached(copy.deepcopy(one.handle.model))
    assert copied is not None
    plain: Any = copied.merge_and_unload()
    if isinstance(plain, PreTrainedModel):
        plain.save_pretrained(tmp_path)
        again: nn.Module = type(plain).from_pretrained(tmp_path).eval()
    else:
        again = one.architecture.build()
        again.load_state_dict(plain.state_dict())
    assert torch.equal(logits_of(again, one.architecture), logits_of(plain, one.architecture))
