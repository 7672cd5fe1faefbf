"""Mixed batches by adapter_names."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from pairs import config, fill, logits, quiet, relative, wrapped
from test_parts import mixed
from tiny import tiny_llama
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from sideroad.errors import AdapterError, MergeError
from sideroad.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

IDS = torch.arange(40).reshape(4, 10) * 3
NAMES = ["b", "__base__", "default", "b"]


def two() -> PeftModel:
    model = wrapped()
    model.add_adapter("b", config(target_modules=["k_proj", "up_proj"], r=2))
    fill(model, seed=4)
    return model


def alone(model: PeftModel, name: str, ids: Tensor, **options: Any) -> Tensor:
    """What one row gets from its adapter alone."""
    run = (lambda: model.generate(ids, **options)) if options else (lambda: logits(model, ids))
    if name == "__base__":
        with model.disable_adapter():
            return run()
    before = model.active_adapter
    model.set_adapter(name)
    found: Tensor = run()
    model.set_adapter(before)
    return found


def test_24_each_row_equals_its_adapter_alone() -> None:
    model = two()
    mixed = logits(model, IDS, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert relative(mixed[row], alone(model, name, IDS[row : row + 1])[0]) <= 1e-5
    assert torch.equal(logits(model, IDS), logits(two(), IDS))


def test_24_the_same_as_peft() -> None:
    model = two()
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"]))
        for name in ("default", "b"):
            peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(model, adapter_name=name), name)
        theirs.eval()
    assert relative(logits(model, IDS, adapter_names=NAMES), logits(theirs, IDS, adapter_names=NAMES)) <= 1e-5


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_25_generation_with_and_without_beams(options: dict[str, Any]) -> None:
    model = two()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    with quiet():
        mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
        each = options.get("num_return_sequences", 1)
        for row, name in enumerate(NAMES):
            expected = alone(model, name, IDS[row : row + 1], **options)
            found = mixed[row * each : (row + 1) * each]
            assert torch.equal(found[:, : expected.shape[1]], expected)


def test_25_an_encoder_sees_each_row_once_and_the_decoder_one_for_each_beam() -> None:
    torch.manual_seed(0)
    shape = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32, "vocab_size": 99}
    base = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, pad_token_id=0)).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["k"]))
    fill(model, size=0.5)
    ids, options = IDS % 90 + 1, {"num_beams": 2, "max_new_tokens": 4}
    with quiet():
        mixed = model.generate(input_ids=ids, adapter_names=NAMES, **options)
        for row, name in enumerate(NAMES):
            expected = alone(model, name, ids[row : row + 1], **options)[0]
            assert torch.equal(mixed[row][: len(expected)], expected)


def test_26_what_peft_refuses_in_training_works_here() -> None:
    model = two().train()
    model.set_adapter(["default", "b"])
    model(IDS, labels=IDS, adapter_names=["b", "b", "__base__", "b"]).loss.backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert all(grad is not None and bool(grad.any()) for name, grad in grads.items() if ".lora.b." in name)
    assert not any(grad is not None and bool(grad.any()) for name, grad in grads.items() if ".lora.default." in name)


def test_26_d5_and_d7_contradictions_raise_and_leave_the_model_as_it_was() -> None:
    model = two()
    says = logits(model, IDS)
    with pytest.raises(AdapterError, match='no adapter is named "x", "y"'):
        model(IDS, adapter_names=["x", "b", "y", "__base__"])
    with pytest.raises(AdapterError, match="adapter_names has 3 names, but the batch has 4 rows"):
        model(IDS, adapter_names=["b", "b", "b"])
    with pytest.raises(AdapterError, match="adapter_names has 2 names, but the batch has 4 rows"):
        model(input_ids=IDS, adapter_names=["__base__", "__base__"])
    with pytest.raises(AdapterError, match="expected a list of names"):
        model(IDS, adapter_names="b")
    with model.disable_adapter(), pytest.raises(AdapterError, match="adapter_names while adapters are disabled"):
        model(IDS, adapter_names=NAMES)
    with pytest.raises(IndexError):
        model(IDS + 10_000, adapter_names=NAMES)
    assert torch.equal(logits(model, IDS), says)
    model.merge_adapter()
    with pytest.raises(MergeError, match="adapter_names while default is merged"):
        model(IDS, adapter_names=NAMES)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), says)


def test_scales_that_were_set_count_in_a_mixed_batch() -> None:
    model = two()
    model.set_scale("b", 0.0)
    mixed = logits(model, IDS, adapter_names=["b"] * 4)
    assert relative(mixed, logits(tiny_llama(), IDS)) <= 1e-6


def test_25_rows_of_embeddings_and_convolutions_and_of_targets_that_do_not_overlap() -> None:
    model = get_peft_model(mixed(), LoraConfig(r=2, target_modules=["emb"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["conv"]))
    fill(model, size=0.5)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 9]])
    found = logits(model, ids, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert relative(found[row], alone(model, name, ids[row : row + 1])[0]) <= 1e-5, name
    assert relative(found, logits(model, ids)) > 1e-3
    with quiet():
        theirs = peft.get_peft_model(mixed(), peft.LoraConfig(r=2, target_modules=["emb"]))
        theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["conv"]))
        for name in ("default", "b"):
            peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(model, adapter_name=name), name)
    assert relative(found, logits(theirs.eval(), ids, adapter_names=NAMES)) <= 1e-5


def test_26_rows_of_attention_are_refused_as_by_peft_and_nothing_is_left() -> None:
    model = get_peft_model(mixed(), LoraConfig(r=2, target_modules=["attn"]))
    fill(model, size=0.5)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = logits(model, ids)
    with pytest.raises(AdapterError, match=r"MultiheadAttention.*Run one adapter at a time"):
        logits(model, ids, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model, ids), before)
