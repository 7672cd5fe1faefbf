"""ties: a head that shares the embedding's weight parts from it when merged; other sharing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import MergeError


def tied() -> tuple[Any, Attached]:
    model = tiny_llama(tie_word_embeddings=True)
    handle = attach(model, AdapterConfig(targets=("lm_head", "q_proj")))
    fill(handle)
    return model, handle


def test_merging_a_tied_head_leaves_the_embedding() -> None:
    model, handle = tied()
    embedding = model.model.embed_tokens.weight
    before, apart = embedding.detach().clone(), model(IDS).logits
    assert model.lm_head.weight is embedding
    handle.merge()
    assert handle.untied == ("lm_head",)
    assert model.lm_head.weight is not embedding
    assert torch.equal(embedding, before)
    assert model.config.tie_word_embeddings is False
    assert model.all_tied_weights_keys == {}
    torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-5, atol=1e-5)
    with handle.disabled():
        base = model(IDS).logits
    handle.unmerge()
    assert handle.untied == ()
    assert model.lm_head.weight is model.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    assert model.config.tie_word_embeddings is True
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    with handle.disabled():
        assert torch.equal(model(IDS).logits, base)
    torch.testing.assert_close(model(IDS).logits, apart)


def test_merged_tied_model_survives_its_files(tmp_path: Path) -> None:
    _, handle = tied()
    plain = handle.merge_and_unload()
    assert handle.untied == ("lm_head",)
    expected = plain(IDS).logits
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_merging_other_layers_keeps_the_tie(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    handle = attach(model, AdapterConfig())
    fill(handle)
    handle.merge()
    assert handle.untied == ()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_head_tied_along_with_others_keeps_the_flag(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model: Any = T5ForConditionalGeneration(T5Config(**fields, decoder_start_token_id=0)).eval()
    assert model.lm_head.weight is model.shared.weight
    handle = attach(model, AdapterConfig(targets="lm_head"))
    fill(handle)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    apart = model(**inputs).logits
    plain: Any = handle.merge_and_unload()
    assert plain.config.tie_word_embeddings is True
    assert set(plain.all_tied_weights_keys) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    torch.testing.assert_close(plain(**inputs).logits, apart, rtol=1e-5, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, apart, rtol=1e-5, atol=1e-5)


def t5() -> Any:
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**fields, decoder_start_token_id=0)).eval()


ENDS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
BOTH_SIDES = {"input_ids": IDS, "decoder_input_ids": IDS}


@pytest.mark.parametrize("targets", ["embed_tokens", ("embed_tokens", "lm_head")], ids=["embedding", "both"])
def test_a_pair_on_a_tied_embedding_leaves_the_head(targets: Any, tmp_path: Path) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    before, base = weight.detach().clone(), model(IDS).logits
    handle = attach(model, AdapterConfig(targets=targets))
    fill(handle)
    apart = model(IDS).logits
    assert not torch.allclose(apart, base)
    handle.merge()
    if targets == "embed_tokens":
        assert handle.untied == ("model.embed_tokens",)
        assert model.lm_head.weight is weight
        assert torch.equal(weight, before)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(model(IDS).logits, apart)
    plain: Any = handle.merge_and_unload()
    expected = plain(IDS).logits
    plain.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("rows", [(), *[(end,) for end in ENDS]], ids=str)
@pytest.mark.parametrize("targets", [(), *[(end,) for end in ENDS], ("shared", "lm_head"), ENDS], ids=str)
def test_four_layers_with_one_weight(rows: tuple[str, ...], targets: tuple[str, ...]) -> None:
    if not rows and not targets:
        return
    model = t5()
    weight = model.shared.weight
    before = weight.detach().clone()
    active = []
    if rows:
        active.append("rows")
        config = AdapterConfig(targets=(), trainable_tokens=dict.fromkeys(rows, (3, 6)))
        fill(attach(model, config, "rows"), "rows", 1.0)
    if targets:
        active.append("pair")
        fill(attach(model, AdapterConfig(targets=targets, method=LoraMethod(rank=2)), "pair"), "pair")
    handle = attached(model)
    assert handle is not None
    handle.activate(active)
    apart = model(**BOTH_SIDES).logits
    handle.merge()
    torch.testing.assert_close(model(**BOTH_SIDES).logits, apart, rtol=1e-5, atol=1e-5)
    weights = {id(model.get_submodule(end).weight) for end in ENDS}
    if "shared" in targets:
        # the others are tied to it by name, so that a file would tie them to it again
        assert len(weights) == 4
    else:
        assert set(handle.untied) == set(targets)
        assert len(weights) == 1 + len(targets)
    handle.unmerge()
    assert all(model.get_submodule(end).weight is weight for end in ENDS)
    assert torch.equal(weight, before)
    assert torch.equal(model(**BOTH_SIDES).logits, apart)


@pytest.mark.parametrize(
    ("rows", "targets"),
    [("shared", ()), ("shared", "lm_head"), (None, "encoder.embed_tokens"), (None, ("decoder.embed_tokens", "shared")),
     ("lm_head", "shared")],
    ids=str,
)
def test_merged_t5_survives_its_files(rows: str | None, targets: Any, tmp_path: Path) -> None:
    model = t5()
    tokens = {rows: (3, 6)} if rows else {}
    if rows and targets:
        fill(attach(model, AdapterConfig(targets=(), trainable_tokens=tokens), "rows"), "rows", 1.0)
        fill(attach(model, AdapterConfig(targets=targets, method=LoraMethod(rank=2)), "pair"), "pair")
        handle = attached(model)
        handle.activate(["rows", "pair"])
    else:
        handle = attach(model, AdapterConfig(targets=targets, trainable_tokens=tokens, method=LoraMethod(rank=2)))
        fill(handle)
    plain: Any = handle.merge_and_unload()
    expected = plain(**BOTH_SIDES).logits
    plain.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**BOTH_SIDES).logits, expected)


def replicated() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9))
    model[2].weight = model[0].weight
    return model


def test_replicated_layers_attach_but_do_not_merge() -> None:
    model = replicated()
    handle = attach(model, AdapterConfig(targets=("0", "1")))
    fill(handle)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        MergeError, match=r"0.weight, 2.weight are one tensor in memory \(replicated or shared layers\)"
    ):
        handle.merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    handle.detach()
    attach(model, AdapterConfig(targets="1")).merge()


def test_overlapping_views_of_one_buffer_are_sharing_too() -> None:
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False))
    buffer = torch.randn(14, 9)
    model[0].weight = nn.Parameter(buffer[:9])
    model[1].weight = nn.Parameter(buffer[5:])
    with pytest.raises(MergeError, match="one tensor in memory"):
        attach(model, AdapterConfig(targets="0")).merge()
    buffer = torch.randn(18, 9)
    apart = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False))
    apart[0].weight, apart[1].weight = nn.Parameter(buffer[:9]), nn.Parameter(buffer[9:])
    attach(apart, AdapterConfig(targets="0")).merge()


def test_shared_module_is_one_layer_and_merges() -> None:
    layer = nn.Linear(9, 9)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    handle = attach(model, AdapterConfig(targets="0"))
    fill(handle)
    x = torch.randn(2, 9)
    apart = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), apart)


def test_moved_model_ties_again() -> None:
    model, handle = tied()
    handle.merge()
    model.to(torch.bfloat16)
    handle.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
