"""vocabulary: only new rows are stored, and the recipe makes room for them on a fresh base."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import fill, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.tensor_files import read_tensors
from sideroad.vocabulary import grow, room_for, settle_untrained, with_grown_rows

OLD, NEW = 259, 263
IDS = torch.tensor([[1, 260, 5, 262, 261, 259]])


def grown(base: LlamaForCausalLM) -> LlamaForCausalLM:
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def trained(base: LlamaForCausalLM, **tokens: tuple[int, ...]) -> tuple[LlamaForCausalLM, Adapter]:
    """A grown model with a filled adapter, and that adapter as it is saved."""
    model = grown(base)
    handle = attach(model, AdapterConfig(targets=("q_proj",), trainable_tokens=tokens))
    fill(handle)
    return model, with_grown_rows(handle.survey(), model, handle.adapter("default"), OLD)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [(), (261, 3)], ids=["untrained", "trained"])
def test_rows_and_recipe_are_all_that_is_saved(tied: bool, ids: tuple[int, ...], tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=tied)
    model, value = trained(base, **({"embed_tokens": ids} if ids else {}))
    value.save(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a/adapter_model.safetensors")
    rows = {name: tensor.shape[0] for name, tensor in tensors.items() if "token" in name or "lm_head" in name}
    root = "base_model.model."
    embedding = {f"{root}model.embed_tokens.token_adapter.trainable_tokens_delta": 4 + (3 in ids)}
    head = {} if tied else {f"{root}lm_head.token_adapter.trainable_tokens_delta": 4}
    assert rows == embedding | head
    again, loaded = copy.deepcopy(base), Adapter.load(tmp_path / "a")
    assert grow(again, loaded)
    handle = attach(again, loaded)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert not grow(again, loaded), "room is made once"
    plain = handle.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied


def test_peft_reads_it_on_a_resized_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_llama()
    model, value = trained(base, embed_tokens=(260,))
    value.save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(grown(base), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)


def test_a_base_without_room_is_told_what_to_do() -> None:
    _, value = trained(tiny_llama(), embed_tokens=(260,))
    with pytest.raises(AdapterError, match=r"outside the 259 rows of model.embed_tokens; call resize_token_"):
        attach(tiny_llama(), value)


def test_nothing_is_added_to_a_vocabulary_that_has_not_grown() -> None:
    model = tiny_llama()
    handle = attach(model, AdapterConfig(targets=("q_proj",)))
    value = handle.adapter("default")
    assert with_grown_rows(handle.survey(), model, value, OLD) is value
    assert not grow(model, value)


def test_what_cannot_be_grown_is_refused() -> None:
    base = tiny_llama()
    _, value = trained(base)
    with pytest.raises(AdapterError, match=r"made for a base of 259 token rows, grown to 263; this .* has 300"):
        grow(tiny_llama(vocab_size=300), value)
    with pytest.raises(AdapterError, match="needs 263 token rows, but Sequential cannot be resized"):
        grow(nn.Sequential(nn.Linear(2, 2)), value)
    with pytest.raises(AdapterError, match=r'expected \{"from": rows, "to": more rows\}'):
        grow(base, replace(value, manifest={"vocabulary": {"from": 4, "to": "5"}}))


def test_a_pair_on_a_grown_embedding_is_refused() -> None:
    model = grown(tiny_llama())
    handle = attach(model, AdapterConfig(targets=("embed_tokens",)))
    with pytest.raises(AdapterError, match="has grown from 259 to 263 rows and carries a low-rank pair"):
        with_grown_rows(handle.survey(), model, handle.adapter("default"), OLD)


def test_a_layer_saved_whole_needs_no_rows() -> None:
    model = grown(tiny_llama())
    handle = attach(model, AdapterConfig(targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head")))
    value = with_grown_rows(handle.survey(), model, handle.adapter("default"), OLD)
    assert set(value.modules) == {"model.embed_tokens", "lm_head"}
    assert value.config.trainable_tokens == {}
    assert value.manifest["vocabulary"] == {"from": OLD, "to": NEW, "trained": {}}


@pytest.mark.parametrize("ids", [(), (261, 3)], ids=["untrained", "trained"])
def test_training_on_does_not_train_rows_that_were_not(ids: tuple[int, ...]) -> None:
    base = tiny_llama()
    model, value = trained(base, **({"embed_tokens": ids} if ids else {}))
    again = copy.deepcopy(base)
    grow(again, value)
    handle = attach(again, settle_untrained(again, value), trainable=True)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    rows = {name: len(one) for name, one in handle.parameters("default").items() if name.endswith("rows")}
    assert rows == ({"model.embed_tokens.rows": 2} if ids else {})
    assert settle_untrained(again, handle.adapter("default")).same_weights(handle.adapter("default"))


def test_new_rows_are_nothing_until_the_adapter_acts() -> None:
    base = tiny_llama()
    _, value = trained(base, embed_tokens=(260,))
    grow(base, value)
    assert not base.get_input_embeddings().weight[OLD:].any()
    assert not base.get_output_embeddings().weight[OLD:].any()


@pytest.mark.parametrize("trains_on", [True, False])
def test_room_that_was_made_in_vain_goes(trains_on: bool) -> None:
    base = tiny_llama()
    _, value = trained(base)
    before = {key: one.clone() for key, one in base.state_dict().items()}
    with pytest.raises(RuntimeError, match="does not fit"), room_for(base, value, trains_on=trains_on):
        raise RuntimeError("does not fit")
    assert base.config.vocab_size == OLD
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    resized = grown(base)
    before = {key: one.clone() for key, one in resized.state_dict().items()}
    with pytest.raises(RuntimeError, match="does not fit"), room_for(resized, value, trains_on=trains_on):
        raise RuntimeError("does not fit")
    assert all(torch.equal(one, before[key]) for key, one in resized.state_dict().items())


def test_a_vocabulary_does_not_grow_under_adapters_of_its_layers() -> None:
    base = tiny_llama()
    _, value = trained(base)
    for config in (AdapterConfig(targets="lm_head"), AdapterConfig(targets="q_proj", modules_to_save=("lm_head",))):
        model = tiny_llama()
        handle = attach(model, config, "a")
        before = model(IDS.clamp(max=OLD - 1)).logits
        with pytest.raises(AdapterError, match="needs a larger vocabulary, but a train the embedding or head"):
            grow(model, value)
        assert torch.equal(model(IDS.clamp(max=OLD - 1)).logits, before)
        handle.detach()
