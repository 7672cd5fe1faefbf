"""Tiny random models of many architectures, for the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _make(config: Any) -> tf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = tf.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Larger than the usual start, so that attention matters and a leak shows.
            if (parameter.ndim == 2 and "embed" not in name) or "experts" in name:
                parameter.data.normal_(std=0.2)
    return model.eval()


def llama(**changes: Any) -> tf.PreTrainedModel:
    return _make(tf.LlamaConfig(**{**COMMON, **changes}))


def mistral(**changes: Any) -> tf.PreTrainedModel:
    return _make(tf.MistralConfig(**{**COMMON, "sliding_window": 10, **changes}))


def qwen2(**changes: Any) -> tf.PreTrainedModel:
    return _make(tf.Qwen2Config(**{**COMMON, **changes}))


def qwen3(**changes: Any) -> tf.PreTrainedModel:
    return _make(tf.Qwen3Config(**{**COMMON, "head_dim": 8, **changes}))


def gemma2(**changes: Any) -> tf.PreTrainedModel:
    fields = {"head_dim": 8, "sliding_window": 10, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    return _make(tf.Gemma2Config(**{**COMMON, **fields, "query_pre_attn_scalar": 8, **changes}))


def gemma3(**changes: Any) -> tf.PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    fields = {"head_dim": 8, "sliding_window": 10, "query_pre_attn_scalar": 8, "layer_types": kinds}
    return _make(tf.Gemma3TextConfig(**{**COMMON, **fields, **changes}))


def phi3(**changes: Any) -> tf.PreTrainedModel:
    return _make(tf.Phi3Config(**{**COMMON, **changes}))


def gpt2(**changes: Any) -> tf.PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _make(tf.GPT2Config(**{**sizes, **quiet, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def opt(**changes: Any) -> tf.PreTrainedModel:
    fields = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    known = {name: value for name, value in COMMON.items() if name not in ("intermediate_size", "num_key_value_heads")}
    return _make(tf.OPTConfig(**{**known, **fields, **changes}))


def bloom(**changes: Any) -> tf.PreTrainedModel:
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return _make(tf.BloomConfig(**{**fields, **quiet, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def mamba(**changes: Any) -> tf.PreTrainedModel:
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return _make(tf.MambaConfig(**{**fields, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def gpt_oss(**changes: Any) -> tf.PreTrainedModel:
    fields = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 10}
    return _make(tf.GptOssConfig(**{**COMMON, **fields, "rope_scaling": None, **changes}))


def mixtral(**changes: Any) -> tf.PreTrainedModel:
    return _make(tf.MixtralConfig(**{**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}))


def qwen2_moe(**changes: Any) -> tf.PreTrainedModel:
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    return _make(tf.Qwen2MoeConfig(**{**COMMON, **sizes, "num_experts": 4, "num_experts_per_tok": 2, **changes}))


ZOO: dict[str, Callable[..., tf.PreTrainedModel]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "gpt2": gpt2,
    "opt": opt,
    "bloom": bloom,
    "mamba": mamba,
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
}
