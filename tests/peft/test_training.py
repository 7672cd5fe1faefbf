"""Training through the front door: checkpointing of activations, LoRA+, and transformers' Trainer."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import both, bytes_of, config, fill, logits, quiet, relative, same, wrapped
from peft.optimizers import create_loraplus_optimizer as create_theirs
from safetensors.torch import load_file
from tiny import IDS, tiny_llama
from torch import nn
from transformers import Trainer, TrainingArguments

from sideroad.errors import AdapterError, ConfigError
from sideroad.peft import PeftModel, create_loraplus_optimizer, get_peft_model

ROWS = [{"input_ids": (torch.arange(8) * 7 + n) % 250, "labels": (torch.arange(8) * 7 + n) % 250} for n in range(12)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "by the base"])
def test_32_and_d27_the_same_gradients_with_recomputed_activations(when: str, reentrant: bool) -> None:
    plain = gradients(wrapped())
    options = {"use_reentrant": reentrant}
    base = tiny_llama()
    if when == "before wrapping":
        base.activation_checkpointing_enable(options)
    model = get_peft_model(base, config())
    fill(model)
    if when == "after wrapping":
        model.activation_checkpointing_enable(options)
    elif when == "by the base":
        base.activation_checkpointing_enable(options)
        model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == plain.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_hook_that_checkpointing_needs_goes_with_the_adapters() -> None:
    base = tiny_llama()
    base.activation_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()
    model = get_peft_model(base, config())
    assert len(base.get_input_embeddings()._forward_hooks) == 1
    assert gradients(model)
    model.unload()
    assert not base.get_input_embeddings()._forward_hooks
    base.enable_input_require_grads()
    model = get_peft_model(base, config())
    assert len(base.get_input_embeddings()._forward_hooks) == 1
    model.unload()
    assert len(base.get_input_embeddings()._forward_hooks) == 1


def test_31_layers_to_transform_trains_only_those() -> None:
    model = get_peft_model(tiny_llama(), config(layers_to_transform=[1]))
    assert {name.split(".")[4] for name in gradients(model)} == {"1"}


def test_34_lora_plus_has_pefts_groups() -> None:
    ours, theirs = both(target_modules=["q_proj", "v_proj"])
    options: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    mine = create_loraplus_optimizer(ours, torch.optim.AdamW, **options)
    other = create_theirs(theirs, torch.optim.AdamW, **options)
    found = [(g["lr"], g["weight_decay"], len(g["params"])) for g in mine.param_groups]
    assert found == [(g["lr"], g["weight_decay"], len(g["params"])) for g in other.param_groups if g["params"]]
    by_id = {id(one): name for name, one in ours.named_parameters()}
    assert {by_id[id(one)].rpartition(".")[2] for one in mine.param_groups[1]["params"]} == {"B"}
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio is 0\.5"):
        create_loraplus_optimizer(ours, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=0.5)
    ours.set_requires_grad("default", False)
    with pytest.raises(AdapterError, match="no parameter of this model is trainable"):
        create_loraplus_optimizer(ours, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=2)


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    """transformers' Trainer with its usual settings, on a few rows."""
    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="steps", logging_steps=1, seed=3,
        **{"max_steps": 4, "save_steps": 2, **options},
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS[:4])


def fresh(**fields: Any) -> PeftModel:
    torch.manual_seed(11)
    return get_peft_model(tiny_llama(), config(lora_dropout=0.1, **fields))


def test_the_trainer_sees_the_same_loss_as_with_peft(tmp_path: Path) -> None:
    ours, theirs = both()
    with quiet():
        runs = [trainer(model, tmp_path / name) for name, model in (("a", ours), ("b", theirs))]
        for run in runs:
            run.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs[0].label_names == runs[1].label_names == ["labels"]
    saved = [load_file(tmp_path / name / "checkpoint-4" / "adapter_model.safetensors") for name in "ab"]
    assert saved[0].keys() == saved[1].keys()
    assert all(relative(saved[0][key], saved[1][key]) <= 1e-3 for key in saved[0])


def test_checkpoints_hold_the_adapter_alone_and_peft_reads_them(tmp_path: Path) -> None:
    model = fresh()
    with quiet():
        run = trainer(model, tmp_path)
        run.train()
        run.save_model()
        run.create_model_card()
    names = {one.name for one in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert "model.safetensors" not in names
    assert {"checkpoint-2", "checkpoint-4", "adapter_model.safetensors"} <= {one.name for one in tmp_path.iterdir()}
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    for place in (tmp_path / "checkpoint-4", tmp_path):
        with quiet():
            read = peft.PeftModel.from_pretrained(tiny_llama(), place)
        assert relative(logits(read.eval()), logits(model.eval())) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resuming_equals_never_having_stopped_bit_for_bit(checkpointing: bool, tmp_path: Path) -> None:
    with quiet():
        whole, again = fresh(), fresh()
        name = next(n for n in inspect.signature(TrainingArguments).parameters if n.endswith("ation_checkpointing"))
        name = name if "activation" in name else "gradient_checkpointing"
        options = {name: checkpointing}
        trainer(whole, tmp_path, **options).train()
        fill(again, seed=7)
        trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(bytes_of(again), bytes_of(whole))
    assert not same(bytes_of(whole), bytes_of(fresh()))


def test_resuming_several_adapters(tmp_path: Path) -> None:
    def make() -> PeftModel:
        model = fresh()
        model.add_adapter("b", config(r=2))
        model.set_adapter("b")
        return model

    with quiet():
        whole, again = make(), make()
        trainer(whole, tmp_path).train()
        trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(bytes_of(again), bytes_of(whole))
    assert again.active_adapter == "b"
    assert not any(one.requires_grad for name, one in again.named_parameters() if ".lora.default." in name)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = fresh()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "loss"}
    with quiet():
        run = trainer(model, tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
        run.train()
    best = Path(str(run.state.best_model_checkpoint))
    assert best.name != "checkpoint-4"
    saved = load_file(best / "adapter_model.safetensors")
    live = model.base_model.handle.adapter("default").weights
    assert all(
        torch.equal(saved[f"base_model.model.{path}.lora_{leaf}.weight"], tensor)
        for path, leaves in live.items()
        for leaf, tensor in leaves.items()
    )


def test_trl_fine_tunes_it(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import chat_rows, tiny_tokenizer
    from trl import SFTConfig, SFTTrainer

    with quiet():
        model = fresh(target_modules="all-linear")
        before = copy.deepcopy(bytes_of(model))
        settings = SFTConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, bf16=False, max_length=64, save_steps=2, disable_tqdm=True, seed=1,
        )  # fmt: skip
        data = Dataset.from_list(chat_rows(8))
        run = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tiny_tokenizer())
        run.train()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if ".lora." in name}
        assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
        read = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-3").eval()
    assert relative(logits(read), logits(model.eval())) <= 1e-5


def test_trl_prefers_with_a_copy_of_the_adapter_as_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import DPOConfig, DPOTrainer

    with quiet():
        model = wrapped(target_modules=["q_proj", "v_proj", "up_proj"])
        settings = DPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, seed=1,
        )  # fmt: skip
        rows = [{"prompt": f"do {n}", "chosen": f"yes {n}", "rejected": f"no no {n}"} for n in range(8)]
        run = DPOTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
        )
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    # the reference starts as the trained adapter itself: -log(1/2)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[1] < losses[0]
    assert model.active_adapter == "default"
