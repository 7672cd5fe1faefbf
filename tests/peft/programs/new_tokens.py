"""New words for a language model: the vocabulary is made larger, and of the embedding only the new rows are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

OLD, NEW = 60, 63


def base(folder: Path) -> LlamaForCausalLM:
    if not (folder / "base").exists():
        torch.manual_seed(0)
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=OLD, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True,
            )
        )  # fmt: skip
        made.save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=list(range(OLD, NEW)),
    )  # fmt: skip
    model = get_peft_model(base(folder), config)
    begin(model)
    rows = (torch.arange(8)[:, None] * 11 + torch.arange(10) * 3) % NEW
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(5):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        said = model(input_ids=rows[:2]).logits
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(base(folder), folder / "adapter")
    with torch.no_grad():
        loaded = again(input_ids=rows[:2]).logits
        merged = again.merge_and_unload()(input_ids=rows[:2]).logits
    return {
        "losses": losses, "logits": said.flatten().tolist(), "loaded": loaded.flatten().tolist(),
        "merged": merged.flatten().tolist(),
    }  # fmt: skip
