"""sideroad.peft with resized vocabularies (D23, behaviours 14 and 41) and tied embeddings (behaviour 42)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model_dir
from torch import Tensor
from transformers import LlamaForCausalLM

from sideroad.errors import TargetError
from sideroad.peft import LoraConfig, PeftModel, get_peft_model
from sideroad.tensor_files import read_tensors

IDS = torch.tensor([[1, 260, 5, 262, 261, 259]])
HEAD, EMBEDDING = (
    f"base_model.model.{path}.token_adapter.trainable_tokens_delta" for path in ("lm_head", "model.embed_tokens")
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("published"))


def load(place: Path, rows: int | None = 263) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(place).eval()
    torch.manual_seed(1)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def trained(place: Path, **fields: Any) -> PeftModel:
    model = get_peft_model(load(place), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("fields", [{}, {"trainable_token_indices": [260, 262]}], ids=["untrained", "trained"])
def test_only_the_new_rows_are_saved_and_room_is_made_again(place: Path, fields: Any, tmp_path: Path) -> None:
    model = trained(place, **fields)
    model.save_pretrained(tmp_path)
    rows = {name: one.shape[0] for name, one in read_tensors(tmp_path / "adapter_model.safetensors").items()}
    assert rows[HEAD] == rows[EMBEDDING] == 4
    assert not [name for name in rows if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    again = PeftModel.from_pretrained(load(place, None), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    on = PeftModel.from_pretrained(load(place, None), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(on), logits(model), rtol=1e-5, atol=1e-6)
    assert on.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    resumed = trained(place, **fields)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(resumed), logits(model), rtol=1e-5, atol=1e-6)


def test_peft_reads_the_rows_on_a_resized_base(place: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(place, trainable_token_indices=[260])
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(place), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


def test_rows_are_left_out_on_request(place: Path, tmp_path: Path) -> None:
    trained(place).save_pretrained(tmp_path, save_embedding_layers=False)
    assert not [name for name in read_tensors(tmp_path / "adapter_model.safetensors") if "token_adapter" in name]


def test_a_vocabulary_that_was_not_resized_adds_nothing(place: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(place, None), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert not [name for name in read_tensors(tmp_path / "adapter_model.safetensors") if "token_adapter" in name]


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_tied_weights_move_together(fields: dict[str, Any], tmp_path: Path) -> None:
    place = tiny_model_dir(tmp_path, tie_word_embeddings=True)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "ensure_weight_tying": True, **fields})
    model = get_peft_model(load(place, None), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.eval().save_pretrained(tmp_path / "a")
    short = IDS[:, :1]
    again = PeftModel.from_pretrained(load(place, None), tmp_path / "a")
    assert torch.equal(again(short).logits, model(short).logits)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load(place, None), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(short).logits, model(short).logits, rtol=1e-5, atol=1e-5)
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(plain(short).logits, theirs(short).logits, rtol=1e-5, atol=1e-5)


def test_nothing_to_tie_is_an_error(place: Path) -> None:
    with pytest.raises(TargetError, match="ensure_weight_tying"):
        get_peft_model(load(place, None), LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))


def test_a_pair_on_a_grown_embedding_is_refused_before_it_is_trained(place: Path) -> None:
    with pytest.raises(TargetError, match=r"lm_head is a target and has grown from 259 to 263 rows"):
        get_peft_model(load(place), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert get_peft_model(load(place, None), LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_a_vocabulary_is_resized_before_it_is_trained(place: Path) -> None:
    model = get_peft_model(load(place, None), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(TargetError, match=r"under adapters that train the embedding or head \(default\)"):
        model.resize_token_embeddings(300)
    model = get_peft_model(load(place, None), LoraConfig(target_modules=["q_proj"]))
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model(input_ids=torch.tensor([[299]])).logits.shape[-1] == 300
