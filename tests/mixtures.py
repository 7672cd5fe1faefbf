"""Tiny random mixtures of experts, and an experts module of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **changes: tf.MixtralConfig(**{**COMMON, "num_local_experts": 4, **changes}),
    "qwen2_moe": lambda **changes: tf.Qwen2MoeConfig(
        **{**COMMON, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 28, **changes}
    ),
    "qwen3_moe": lambda **changes: tf.Qwen3MoeConfig(
        **{**COMMON, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 4, **changes}
    ),
    "gpt_oss": lambda **changes: tf.GptOssConfig(
        **{**COMMON, "num_local_experts": 4, "head_dim": 4, "sliding_window": 64, "rope_scaling": None, **changes}
    ),
}
"""Name → configuration of a mixture of four experts, two of them for each token."""

IDS = torch.arange(24).reshape(2, 12) * 4
"""Two rows of twelve tokens."""


def mixture(name: str, **changes: Any) -> tf.PreTrainedModel:
    """A random mixture in fp32 and eval mode: 2 blocks, hidden 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: tf.PreTrainedModel = tf.AutoModelForCausalLM.from_config(CONFIGS[name](**changes))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """What a model says to `IDS`."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


class OwnExperts(nn.Module):
    """Experts as transformers stores them; each token names its one expert."""

    def __init__(self, count: int, width: int = 6, inner: int = 10, *, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts = count
        shapes = {"up_proj": (inner, width), "down_proj": (width, inner)}
        if transposed:
            self.is_transposed = True
        for name, (rows, columns) in shapes.items():
            shape = (count, columns, rows) if transposed else (count, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.4))

    def matrix(self, name: str, expert: int) -> Tensor:
        """One expert's weight, [out, in]."""
        weight = getattr(self, name)[expert]
        return weight.t() if hasattr(self, "is_transposed") else weight

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in expert.unique().tolist():
            inner = functional.gelu(x[expert == index] @ self.matrix("up_proj", index).t())
            out = out.index_add(0, (expert == index).nonzero()[:, 0], inner @ self.matrix("down_proj", index).t())
        return out


class Own(nn.Module):
    """A model with those experts inside."""

    def __init__(self, count: int = 3, *, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = OwnExperts(count, transposed=transposed)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        out: Tensor = self.experts(x, expert)
        return out
