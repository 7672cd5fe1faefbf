"""tying: heads that follow a trained embedding, in the forward, in files and through a merge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, TargetError
from sideroad.methods.lora import LoraDelta
from sideroad.methods.tied import TiedPair

CASES: dict[str, dict[str, Any]] = {
    "embedding": {"targets": ("embed_tokens", "q_proj")},
    "head": {"targets": ("lm_head", "q_proj")},
    "whole embedding": {"targets": ("q_proj",), "modules_to_save": ("embed_tokens",)},
    "whole head": {"targets": ("q_proj",), "modules_to_save": ("lm_head",)},
    "rows": {"targets": ("q_proj",), "trainable_tokens": {"embed_tokens": (3, 1)}},
}
WHOLE = ("whole embedding", "whole head")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


def config(case: str) -> AdapterConfig:
    return AdapterConfig(**CASES[case], tie_embeddings=True, method=LoraMethod(rank=4, alpha=6))


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def test_a_pair_on_the_head_is_the_embeddings_turned_round() -> None:
    A, B = torch.randn(3, 11), torch.randn(6, 3)
    source = LoraDelta(A, B, scale=2.0)
    head, tied = nn.Linear(6, 11, bias=False), TiedPair(source)
    x = torch.randn(5, 6)
    y = head(x)
    torch.testing.assert_close(tied(x, y, head, 0.5), y + 0.5 * 2.0 * x @ (B @ A))
    torch.testing.assert_close(tied.lower(head).dense(), 2.0 * (B @ A).t())
    assert list(tied.parameters()) == []
    tied(x, y, head, 1.0).sum().backward()
    assert source.A.grad is not None
    assert source.B.grad is not None


@pytest.mark.parametrize("case", CASES)
def test_both_move_together_and_the_tie_survives_a_merge(case: str) -> None:
    model = base()
    before = logits(model)
    handle = attach(model, config(case))
    assert torch.equal(logits(model), before)
    fill(handle)
    changed = logits(model)
    assert not torch.equal(changed, before)
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    handle.merge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert handle.untied == ()
    torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), changed)
    handle.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", CASES)
def test_files_hold_both_and_peft_reads_them(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = base()
    handle = attach(model, config(case))
    fill(handle)
    value = handle.adapter("default")
    value.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    again = attach(base(), Adapter.load(tmp_path / "a"))
    assert torch.equal(logits(again.model), logits(model))
    assert again.adapter("default").same_weights(value)
    assert len(again.parameters("default")) == len(handle.parameters("default"))


FIELDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]},
}


@pytest.mark.parametrize("case", FIELDS)
def test_pefts_files_give_the_same_logits_and_gradients(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=6, ensure_weight_tying=True, **FIELDS[case]))
    draw = torch.Generator().manual_seed(1)
    own = list({id(one): one for one in theirs.eval().parameters() if one.requires_grad}.values())
    for parameter in own:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    theirs.save_pretrained(tmp_path / "a")
    handle = attach(base(), Adapter.load(tmp_path / "a"), trainable=True)
    torch.testing.assert_close(logits(handle.model), logits(theirs), rtol=1e-5, atol=1e-5)
    for model in (handle.model, theirs):
        logits(model).square().mean().backward()
    norms = [norms_of(list(handle.parameters("default").values())), norms_of(own)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def norms_of(parameters: list[nn.Parameter]) -> list[float]:
    """Norms of gradients; PEFT's follower has parameters of its own over the same memory, whose gradients add up."""
    summed: dict[int, Tensor] = {}
    for one in parameters:
        if one.grad is not None:
            held = summed.get(one.data_ptr())
            summed[one.data_ptr()] = one.grad if held is None else held + one.grad.t()
    return sorted(float(one.norm()) for one in summed.values())


def test_an_untied_base_lets_both_of_a_file_act_by_themselves() -> None:
    handle = attach(base(), config("embedding"))
    fill(handle)
    value = handle.adapter("default")
    apart = tiny_llama()
    with torch.no_grad():
        apart.lm_head.weight.copy_(apart.model.embed_tokens.weight)
    other = attach(apart, value)
    torch.testing.assert_close(logits(apart), logits(handle.model), rtol=1e-5, atol=1e-5)
    assert "lm_head.A" in other.parameters("default")


def test_tensors_of_a_follower_must_be_its_leaders() -> None:
    handle = attach(base(), config("embedding"))
    value = handle.adapter("default")
    wrong = {**value.weights, "lm_head": {**value.weights["lm_head"], "A": value.weights["lm_head"]["A"] + 1}}
    with pytest.raises(AdapterError, match="lm_head should follow a tied embedding"):
        attach(base(), replace(value, weights=wrong))


def test_nothing_to_tie_is_refused() -> None:
    with pytest.raises(TargetError, match="nothing that is trained in LlamaForCausalLM shares its weight"):
        attach(tiny_llama(), config("embedding"))
    with pytest.raises(TargetError, match="leave it out, or name the tied embedding"):
        attach(base(), AdapterConfig(targets="q_proj", tie_embeddings=True))


def test_without_the_option_only_the_named_one_is_trained() -> None:
    model = base()
    handle = attach(model, AdapterConfig(targets="embed_tokens"))
    fill(handle)
    hidden = torch.randn(1, 32)
    expected = torch.nn.functional.linear(hidden, model.lm_head.weight)
    assert torch.equal(model.lm_head(hidden), expected)
    changed = logits(model)
    handle.merge()
    assert handle.untied == ("model.embed_tokens",)
    torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)


def test_copies_keep_following() -> None:
    model = base()
    fill(attach(model, config("embedding")))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        twin.model.embed_tokens.lora._modules["default"].A.zero_()
    torch.testing.assert_close(twin.lm_head(torch.ones(32)), base().lm_head(torch.ones(32)))


def test_a_tied_heads_own_pair_acts_beside_the_embeddings_rows(tmp_path: Path) -> None:
    config = AdapterConfig(
        targets=("lm_head", "q_proj"), method=LoraMethod(rank=4), trainable_tokens={"embed_tokens": (3, 6, 9)}
    )
    model = tiny_llama(tie_word_embeddings=True)
    handle = attach(model, config, seed=0)
    names = [name for name in handle.parameters("default") if "layers" not in name]
    assert names == ["model.embed_tokens.rows", "lm_head.A", "lm_head.B"]
    fill(handle)
    head = model.lm_head
    state = {name: one.detach().clone() for name, one in handle.parameters("default").items()}
    found, hidden = model(IDS).logits, model.model(IDS).last_hidden_state
    weight = head.weight.index_copy(0, torch.tensor([3, 6, 9]), state["model.embed_tokens.rows"])
    weight = weight + 4.0 * state["lm_head.B"] @ state["lm_head.A"]
    torch.testing.assert_close(found, hidden @ weight.t(), rtol=1e-4, atol=1e-5)
    handle.adapter("default").save(tmp_path / "a")
    again = attach(tiny_llama(tie_word_embeddings=True), Adapter.load(tmp_path / "a"))
    assert torch.equal(again.model(IDS).logits, found)
    twin = attached(copy.deepcopy(model))
    assert twin is not None
    assert torch.equal(twin.model(IDS).logits, found)
    before = head.weight.clone()
    for one in (handle, twin):
        one.merge()
        torch.testing.assert_close(one.model(IDS).logits, found, rtol=1e-4, atol=1e-5)
        one.unmerge()
    assert torch.equal(head.weight, before)
    assert head.weight is model.model.embed_tokens.weight
    handle.detach()
    assert not [name for name in model.state_dict() if "lora" in name]


def test_dropout_acts_on_the_heads_own_input() -> None:
    source = LoraDelta(torch.ones(3, 11), torch.ones(6, 3), scale=1.0, dropout=0.5)
    head, tied, x = nn.Linear(6, 11, bias=False), TiedPair(source), torch.ones(64, 6)
    y = head(x)
    assert len((tied(x, y, head, 1.0) - y).detach().unique(dim=0)) > 2
    tied.eval()
    assert len((tied(x, y, head, 1.0) - y).detach().round(decimals=3).unique(dim=0)) == 1


def test_a_head_whose_embedding_is_trained_whole_is_trained_with_it(tmp_path: Path) -> None:
    both = AdapterConfig(targets=("lm_head", "q_proj"), modules_to_save=("embed_tokens",), tie_embeddings=True)
    handle = attach(base(), both)
    fill(handle)
    handle.adapter("default").save(tmp_path / "a")
    again = attach(base(), Adapter.load(tmp_path / "a"))
    assert torch.equal(logits(again.model), logits(handle.model))
