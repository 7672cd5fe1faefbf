"""The peers of `bench/train.py`: a bare PEFT loop, and TRL's SFTTrainer driven one step at a time.

Nothing of sideroad is imported, so that a process which only runs a peer starts as its users' processes do. Peers are
imported when a side is made; `bench/environment.py` sees to it that they are there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

Rows = Sequence[Any]
"""Encoded rows: each has `ids`, and for each of them whether its prediction is `trained`."""

Batches = Sequence[Rows]
Step = Callable[[int], tuple[float, int]]
"""Takes the optimizer step of a turn; returns its mean loss, and how many real tokens it saw."""

Made = tuple[Step, dict[str, Any]]
"""A side's step, and what is worth recording about how it computes."""

RANK, ALPHA, RATE = 8, 16, 1e-4
IGNORED = -100


def lora_config() -> Any:
    """Return PEFT's configuration of the adapter that every side trains."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def peft_side(base: Any, batches: Batches, _stack: ExitStack) -> Made:
    """A bare PEFT loop, as its documentation teaches it: batches padded on the right, labels, AdamW.

    Args:
        base: has `model` and `tokenizer`.
        batches: one for each turn.
    """
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base.model, lora_config())
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(turn: int) -> tuple[float, int]:
        rows = batches[turn]
        loss = model(**padded(rows, base.tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), sum(len(row.ids) for row in rows)

    return step, {}


def padded(rows: Rows, pad: int) -> dict[str, torch.Tensor]:
    """Return rows as a right-padded batch with labels."""
    longest = max(len(row.ids) for row in rows)
    filling = [longest - len(row.ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.ids + [pad] * more for row, more in zip(rows, filling, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - more) + [0] * more for more in filling]),
        "labels": torch.tensor([labels(row) + [IGNORED] * more for row, more in zip(rows, filling, strict=True)]),
    }


def labels(row: Any) -> list[int]:
    """Return the labels of an encoded row: its ids where the prediction is trained, else -100."""
    return [token if on else IGNORED for token, on in zip(row.ids, row.trained, strict=True)]


def trl_side(base: Any, batches: Batches, stack: ExitStack) -> Made:
    """TRL's SFTTrainer at its defaults: bf16 autocast and recomputed activations, also on a CPU."""
    return _sft(base, batches, stack, {})


def trl_padding_free_side(base: Any, batches: Batches, stack: ExitStack) -> Made:
    """TRL in full precision, keeping activations, each batch flattened to one row without padding."""
    return _sft(base, batches, stack, {**_PRECISE, "padding_free": True, "max_length": None})


def trl_packing_side(base: Any, batches: Batches, stack: ExitStack) -> Made:
    """TRL in full precision, keeping activations, rows packed anew into blocks of about a batch's tokens.

    A step is one block, so that it holds as many real tokens as other sides' steps; no row is cut.
    """
    longest = max(len(row.ids) for rows in batches for row in rows)
    usual = statistics.mean(sum(len(row.ids) for row in rows) for rows in batches)
    packed = {"packing": True, "max_length": max(longest, round(usual)), "per_device_train_batch_size": 1}
    # Blocks are made longest row first; a sequential order would begin with those that hold one row.
    return _sft(base, batches, stack, {**_PRECISE, **packed, "train_sampling_strategy": "random"})


_PRECISE = {"bf16": False, "gradient_checkpointing": False}


def _sft(base: Any, batches: Batches, stack: ExitStack, options: dict[str, Any]) -> Made:
    """Drive an SFTTrainer by hand, in the order of its own training loop (transformers' `Trainer._run_epoch`)."""
    trainer = _trainer(base, batches, stack, options)
    if trainer.args.activation_checkpointing:
        kept = dict(trainer.args.activation_checkpointing_kwargs or {})
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kept or None)
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.create_scheduler(num_training_steps=len(batches))
    trainer.current_gradient_accumulation_steps = 1
    supply = _forever(trainer.get_train_dataloader())

    def step(_turn: int) -> tuple[float, int]:
        (inputs,), items = trainer.get_batch_samples(supply, 1, trainer.args.device)
        real = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        loss = trainer.training_step(model, inputs, items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return float(loss), real

    recorded = ("bf16", "activation_checkpointing", "padding_free", "packing", "max_length", "optim")
    return step, {name: str(getattr(trainer.args, name)) for name in recorded}


def _trainer(base: Any, batches: Batches, stack: ExitStack, options: dict[str, Any]) -> Any:
    """An SFTTrainer whose batches, in order, are those given, unless the options pack them anew."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    chosen = {
        "output_dir": stack.enter_context(tempfile.TemporaryDirectory()),
        "per_device_train_batch_size": len(batches[0]),
        "train_sampling_strategy": "sequential",
        "learning_rate": RATE,
        "use_cpu": True,
        "report_to": "none",
    }
    # One batch more than is taken: accelerate treats the last one of a loader apart.
    rows = [row for each in (*batches, batches[-1]) for row in each]
    columns = {"input_ids": [row.ids for row in rows], "labels": [labels(row) for row in rows]}
    return SFTTrainer(
        model=base.model,
        args=SFTConfig(**{**chosen, **options}),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=base.tokenizer,
        peft_config=lora_config(),
    )


def _forever(loader: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from loader
