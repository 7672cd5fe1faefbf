"""What QLoRA's scripts do around a base in few bits, on a base in bfloat16: prepare, checkpoint, accumulate, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import LlamaConfig, LlamaForCausalLM


def find_all_linear_names(model: torch.nn.Module) -> list[str]:
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(names - {"lm_head"})


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    model.config.use_cache = False
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=find_all_linear_names(model), lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config)
    begin(model)
    if not hasattr(model, "enable_input_require_grads"):
        raise RuntimeError("a base of transformers has it")
    model.enable_input_require_grads()
    trainable, total = model.get_nb_trainable_parameters()
    rows = (torch.arange(16)[:, None] * 5 + torch.arange(12)) % 60 + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    model.train()
    for step in range(4):
        for part in rows[4 * step : 4 * step + 4].split(2):
            loss = model(input_ids=part, labels=part).loss / 2
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(get_peft_model_state_dict(model), folder / "state.pt")
    model.eval()
    with torch.no_grad():
        said = model(input_ids=rows[:2]).logits
        set_peft_model_state_dict(model, {k: v * 0 for k, v in get_peft_model_state_dict(model).items()})
        empty = model(input_ids=rows[:2]).logits
        set_peft_model_state_dict(model, torch.load(folder / "state.pt", weights_only=True))
        again = model(input_ids=rows[:2]).logits
    return {
        "losses": losses, "logits": said.flatten().tolist(), "empty": empty.flatten().tolist(),
        "again": again.flatten().tolist(), "parameters": [trainable, total],
    }  # fmt: skip
