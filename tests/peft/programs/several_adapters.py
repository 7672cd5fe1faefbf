"""Several adapters on one base: added, trained in turn, saved apart, loaded, chosen, mixed in a batch, deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def train(model: Any, rows: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path, begin: Callable[[Any], None]) -> dict[str, list[float]]:
    common = {"task_type": "CAUSAL_LM", "lora_alpha": 16, "fan_in_fan_out": True}
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["c_attn"], **common), adapter_name="french")
    model.add_adapter("german", LoraConfig(r=8, target_modules=["c_attn", "c_proj"], **common))
    begin(model)
    rows = (torch.arange(6)[:, None] * 7 + torch.arange(10)) % 60 + 3
    found = {"losses": train(model, rows)}
    model.set_adapter("german")
    found["losses"] += train(model, rows.flip(1))
    model.save_pretrained(folder)

    served = PeftModel.from_pretrained(base(), folder / "french", adapter_name="french")
    served.load_adapter(folder / "german", adapter_name="german")
    served.eval()
    with torch.no_grad():
        for name in ("french", "german"):
            served.set_adapter(name)
            found[name] = served(input_ids=rows[:1]).logits.flatten().tolist()
        names = ["german", "__base__", "french", "german", "__base__", "french"]
        found["mixed"] = served(input_ids=rows, adapter_names=names).logits.flatten().tolist()
        found["generated"] = (
            served.generate(input_ids=rows[:, :4], adapter_names=names, max_new_tokens=5, do_sample=False)
            .flatten()
            .tolist()
        )
        served.base_model.set_adapter(["french", "german"])
        found["sum"] = served(input_ids=rows[:1]).logits.flatten().tolist()
        served.set_adapter("german")
        served.delete_adapter("french")
        found["left"] = served(input_ids=rows[:1]).logits.flatten().tolist()
        served.merge_adapter()
        found["merged"] = served(input_ids=rows[:1]).logits.flatten().tolist()
        served.unmerge_adapter()
        found["unloaded"] = served.unload()(input_ids=rows[:1]).logits.flatten().tolist()
    return found
