"""T5 with Seq2SeqTrainer: labels in, generated sequences out; then an adapter loaded for more training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration


def base() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )  # fmt: skip


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.0)
    model = get_peft_model(base(), config)
    begin(model)
    rows = [
        {"input_ids": (torch.arange(7) * 2 + n) % 60 + 3, "labels": (torch.arange(5) + 3 * n) % 60 + 3}
        for n in range(16)
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        predict_with_generate=True, generation_max_length=8, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    predicted = trainer.predict(rows[:4])
    model.save_pretrained(folder / "adapter")

    config = PeftConfig.from_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True, config=config)
    optimizer = torch.optim.SGD([one for one in again.parameters() if one.requires_grad], lr=0.1)
    batch = {name: torch.stack([row[name] for row in rows[:4]]) for name in ("input_ids", "labels")}
    more = []
    for _ in range(2):
        loss = again(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        more.append(loss.item())
    again.eval()
    beams = again.generate(input_ids=batch["input_ids"], num_beams=3, max_new_tokens=5)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "predicted": predicted.predictions.flatten().tolist(),
        "validation": [predicted.metrics["test_loss"]],
        "more": more,
        "beams": beams.flatten().tolist(),
    }
