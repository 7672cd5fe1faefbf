"""Tiny random models and a byte-level tokenizer, made in milliseconds and without a network."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sideroad.handle import Attached

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Token ids 0, 1 and 2: padding and end of text, start of a turn, end of a turn."""

IDS = torch.arange(10)[None] * 3
"""One row of ten tokens, [1, 10]."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system prompt."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte plus three special ones (259 in all), a ChatML template; any text survives the round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=CHATML,
        model_max_length=512,
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in fp32 and eval mode: 2 blocks, hidden 32, 4 heads over 2 key-value heads, 259 tokens.

    Args:
        seed: of the weights; the global generator is left as it was.
        changes: `LlamaConfig` fields that differ, such as `tie_word_embeddings=True`.
    """
    fields: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    return model.eval()


def fill(handle: Attached, name: str = "default", size: float = 0.1) -> None:
    """Give an adapter random values of that spread in place, so that it changes what the model says."""
    torch.manual_seed(len(name))
    for parameter in handle.parameters(name).values():
        nn.init.normal_(parameter.data, std=size)


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on, under the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the system's own refusal, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def tiny_model_dir(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_llama` and `tiny_tokenizer` to `folder`/tiny-llama as a local base model; returns that directory."""
    path = folder / "tiny-llama"
    tiny_llama(seed, **changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a small task in chat form, all different: a command in, a JSON object with an intent out."""
    intents = ("light", "music", "timer")
    rows = []
    for index in range(start, start + count):
        intent = intents[index % len(intents)]
        answer = json.dumps({"intent": intent, "room": index})
        turns = [
            {"role": "user", "content": f"{intent} in room {index}"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": turns})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object per line; returns `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
