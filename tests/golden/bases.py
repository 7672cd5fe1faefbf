"""The tiny models that the golden adapters belong to; runs under old torch and transformers as well as new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

WEIGHTS = Path(__file__).parent / "bases"
DERIVED = ("lm_head.weight", "attn.bias", "masked_bias", "position_ids")
"""Ends of names that some versions of transformers have in a state dict and others have not."""


class Mlp(nn.Module):
    """Two blocks of two linear layers and a head; takes vectors, [batch, 5] to [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.ModuleDict({"up": nn.Linear(5, 6), "down": nn.Linear(6, 5)}) for _ in range(2)]
        self.body = nn.ModuleDict({"layers": nn.ModuleList(block)})
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Residual blocks, then the head."""
        for block in self.body["layers"].children():
            x = x + block.down(torch.tanh(block.up(x)))
        out: Tensor = self.head(x)
        return out


class Fused(nn.Module):
    """A fused projection to q, k and v stored [in, out] (Conv1D), and one back; [batch, 4] to [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(12, 4), Conv1D(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the three parts so that each one counts."""
        q, k, v = self.c_attn(x).split(4, dim=-1)
        out: Tensor = self.c_proj(torch.tanh(q) * k + v)
        return out


class Words(nn.Module):
    """An embedding and a linear layer; takes ids, [batch, length] to [batch, length, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lin = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up and project."""
        out: Tensor = self.lin(torch.tanh(self.words(ids)))
        return out


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, one of them grouped; [batch, 2, 5, 5] to [batch, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.line, self.space = nn.Conv1d(4, 3, 3), nn.Conv3d(1, 2, (2, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        x = torch.tanh(self.grouped(torch.tanh(self.plane(x))))
        x = torch.tanh(self.line(x.flatten(2)))
        out: Tensor = self.space(x[:, None, :, :, None]).mean((2, 3, 4))
        return out


class Attention(nn.Module):
    """torch's own attention and a linear layer; [length, batch, 4] to [length, batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.lin = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to itself."""
        out: Tensor = self.lin(self.mix(x, x, x, need_weights=False)[0])
        return out


def gpt2() -> nn.Module:
    """Return a real GPT-2, head tied to the embedding; takes ids, gives logits [batch, length, 13]."""
    shape = {"n_embd": 4, "n_layer": 1, "n_head": 2, "vocab_size": 13, "n_positions": 8}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**shape, **drops, bos_token_id=0, eos_token_id=0))
    return model


def bert() -> nn.Module:
    """Return a real BERT with a classifier; takes ids, gives logits [batch, 2]."""
    shape = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 13, "max_position_embeddings": 8, "type_vocab_size": 1}
    model: nn.Module = BertForSequenceClassification(BertConfig(**shape, **drops, **sizes, num_labels=2))
    return model


BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (2, 5)),
    "fused": (Fused, (2, 4)),
    "words": (Words, (1, 9)),
    "convolutions": (Convolutions, (2, 2, 5, 5)),
    "attention": (Attention, (3, 2, 4)),
    "gpt2": (gpt2, (1, 8)),
    "bert": (bert, (1, 8)),
}
"""Name → how to make it, and the shape of its input."""


def build(name: str) -> nn.Module:
    """Return a base in eval mode with the stored weights."""
    model = BASES[name][0]()
    stored = load_file(str(WEIGHTS / f"{name}.safetensors"))
    missing, unexpected = model.load_state_dict(stored, strict=False)
    lost = [key for key in missing if not key.endswith(DERIVED)]
    if lost or unexpected:
        raise ValueError(f"{name}: stored weights do not fit: missing {lost}, unexpected {unexpected}")
    return model.eval()


def store(name: str) -> None:
    """Write a base's weights, drawn from a fixed seed, once."""
    torch.manual_seed(0)
    model = BASES[name][0]()
    tensors = {key: torch.randn(t.shape) * 0.5 for key, t in model.state_dict().items() if not key.endswith(DERIVED)}
    WEIGHTS.mkdir(exist_ok=True)
    save_file(tensors, str(WEIGHTS / f"{name}.safetensors"), metadata={"format": "pt"})


def inputs(name: str) -> Tensor:
    """Return the fixed input of a base: ids in order, or waves."""
    shape = BASES[name][1]
    count = torch.Size(shape).numel()
    if name in ("words", "gpt2", "bert"):
        return torch.arange(count).reshape(shape)
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7).float().reshape(shape)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return what a model gives, logits where it is a language model."""
    with torch.no_grad():
        found = model(x)
    out: Tensor = found if isinstance(found, Tensor) else found.logits
    return out
