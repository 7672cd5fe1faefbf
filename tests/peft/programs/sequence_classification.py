"""A classifier of sequences with transformers' Trainer; its new head is trained whole, and a dense layer with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=3, **shape)).save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"],
        modules_to_save=["classifier", "pooler"],
    )  # fmt: skip
    model = get_peft_model(base, config)
    begin(model)
    rows = [{"input_ids": (torch.arange(9) * 3 + n) % 60, "labels": torch.tensor(n % 3)} for n in range(24)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        eval_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8],
        compute_metrics=lambda said: {"accuracy": float((said.predictions.argmax(-1) == said.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    predicted = trainer.predict(rows[:8]).predictions
    trainer.save_model(str(folder / "adapter"))
    again = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=3)
    with torch.no_grad():
        said = again(input_ids=torch.stack([row["input_ids"] for row in rows[:8]])).logits
    log = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "validation": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "accuracy": [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry],
        "predicted": predicted.flatten().tolist(),
        "logits": said.flatten().tolist(),
    }
