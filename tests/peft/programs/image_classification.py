"""A vision transformer with a new classifier that is trained whole, in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification


def base() -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **shape))


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias="none",
        modules_to_save=["classifier"],
    )  # fmt: skip
    model = get_peft_model(base(), config)
    begin(model)
    draw = torch.Generator().manual_seed(3)
    rows = [{"pixel_values": torch.randn(3, 16, 16, generator=draw), "labels": n % 5} for n in range(20)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), remove_unused_columns=False, max_steps=5, per_device_train_batch_size=4,
        learning_rate=1e-2, logging_steps=1, label_names=["labels"], save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])
    trainer.train()
    validation = trainer.evaluate()["eval_loss"]
    model.save_pretrained(folder / "adapter")

    config = PeftConfig.from_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(base(), folder / "adapter")
    merged = again.merge_and_unload()
    images = torch.stack([row["pixel_values"] for row in rows[:4]])
    with torch.no_grad():
        said = merged(pixel_values=images).logits
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "validation": [validation],
        "merged": said.flatten().tolist(),
        "rank": [config.r, config.lora_alpha],
    }
