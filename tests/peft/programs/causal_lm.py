"""A causal language model, fine-tuned by a loop of one's own, saved, loaded again and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(base(), config)
    begin(model)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = (torch.arange(16)[:, None] * 5 + torch.arange(12)) % 60 + 3
    losses = []
    model.train()
    for batch in DataLoader(rows, batch_size=4):
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    model.save_pretrained(folder)

    again = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        said = again(input_ids=rows[:2]).logits
        with again.disable_adapter():
            plain = again(input_ids=rows[:2]).logits
    made = again.generate(input_ids=rows[:1, :4], max_new_tokens=6, do_sample=False)
    merged = again.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    with torch.no_grad():
        whole = LlamaForCausalLM.from_pretrained(folder / "merged")(input_ids=rows[:2]).logits
    return {
        "losses": losses, "logits": said.flatten().tolist(), "base": plain.flatten().tolist(),
        "merged": whole.flatten().tolist(), "generated": made.flatten().tolist(),
    }  # fmt: skip
