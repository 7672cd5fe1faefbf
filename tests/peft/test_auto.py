"""AutoPeftModel: from an adapter's directory to base and adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pairs import config, fill, logits, quiet, relative
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sideroad.errors import AdapterError
from sideroad.peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
)


def saved(folder: Path, task: str | None = "CAUSAL_LM") -> PeftModel:
    """A base and an adapter in directories beside each other."""
    tiny_llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = get_peft_model(base, config(task_type=task))
    fill(model)
    model.save_pretrained(folder / "adapter")
    return model


def test_the_task_says_the_classes(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is PeftModelForCausalLM
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.base_model_torch_dtype is torch.float32
    narrow = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16)
    assert narrow.base_model_torch_dtype is torch.bfloat16
    assert {one.dtype for one in narrow.parameters() if one.requires_grad} == {torch.float32}
    with pytest.raises(AdapterError, match="load it with AutoPeftModelForCausalLM, not AutoPeftModelF"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="is a local directory and has none"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", revision="v1")


def test_without_a_task_the_file_says_the_class_and_only_of_transformers(tmp_path: Path) -> None:
    model = saved(tmp_path, task=None)
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is PeftModel
    assert torch.equal(logits(loaded), logits(model))
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "auto_mapping": {"base_model_class": "system", "parent_library": "os"}}))
    with pytest.raises(AdapterError, match="does not say a class of transformers"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    file.write_text(json.dumps({**said, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not say its base"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_a_larger_tokenizer_beside_the_adapter_makes_the_base_larger(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<other>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with quiet():
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == 261


def test_an_adapter_that_says_its_vocabulary_counts_more_than_the_tokenizer_beside_it(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.resize_token_embeddings(264, mean_resizing=False)
    model = get_peft_model(base, config())
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert relative(logits(loaded), logits(model)) <= 1e-6
