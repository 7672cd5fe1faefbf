"""`sideroad targets`: the counts of models in the literature, from their configuration alone.

|Theta| = r · Σ (in + out) over the adapted matrices (LoRA, Hu et al. 2021, arXiv:2106.09685, sec. 4.1). The numbers
were computed from the models' shapes; published tables round them, and some are wrong.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from terminal import call
from transformers import DebertaV2Config, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig, RobertaConfig


@dataclass(frozen=True)
class Shape:
    """A model as its `config.json` describes it, and its number of parameters where it is known."""

    architecture: str
    config: PretrainedConfig
    parameters: int | None = None


def gpt2(width: int, layers: int, heads: int, **changes: Any) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, **changes)


def roberta(**changes: Any) -> RobertaConfig:
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **changes)


GPT3: dict[str, Any] = {"hidden_size": 12288, "num_hidden_layers": 96, "num_attention_heads": 96, "ffn_dim": 49152}
LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}

# GPT-3 has no class of its own: once with q and v as layers, once as slices of one fused layer
SHAPES = {
    "gpt-3": Shape("OPTForCausalLM", OPTConfig(word_embed_proj_dim=12288, **GPT3)),
    "gpt-3-fused": Shape("GPT2LMHeadModel", gpt2(12288, 96, 96, n_positions=2048)),
    "llama-2-7b": Shape("LlamaForCausalLM", LlamaConfig(), 6_738_415_616),
    "llama-3-8b": Shape(
        "LlamaForCausalLM",
        LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
        8_030_261_248,
    ),
    "llama-65b": Shape(
        "LlamaForCausalLM",
        LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64),
        65_285_660_672,
    ),
    "gpt2-medium": Shape("GPT2LMHeadModel", gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": Shape("GPT2LMHeadModel", gpt2(1280, 36, 20), 774_030_080),
    "roberta-base": Shape("RobertaForSequenceClassification", roberta()),
    "roberta-large": Shape("RobertaForSequenceClassification", roberta(**LARGE, intermediate_size=4096)),
    "deberta-xxl": Shape(
        "DebertaV2ForSequenceClassification",
        DebertaV2Config(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144),
    ),
}

Q_V, ALL = ("q_proj", "v_proj"), ("all-linear",)
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("c_attn[q,v]",)
"""The q and v slices of a fused layer."""

COUNTS = [
    ("gpt-3", Q_V, 1, 4_718_592),
    ("gpt-3", Q_V, 2, 9_437_184),
    ("gpt-3", Q_V, 4, 18_874_368),
    ("gpt-3", Q_V, 8, 37_748_736),
    ("gpt-3", Q_V, 64, 301_989_888),
    ("gpt-3", ATTENTION, 64, 603_979_776),
    ("gpt-3-fused", FUSED, 1, 4_718_592),
    ("gpt-3-fused", FUSED, 64, 301_989_888),
    ("llama-2-7b", Q_V, 8, 4_194_304),
    ("llama-2-7b", LLAMA, 8, 8_388_608),
    ("llama-2-7b", ALL, 8, 19_988_480),
    ("llama-2-7b", ALL, 16, 39_976_960),
    ("llama-2-7b", ALL, 64, 159_907_840),
    ("llama-3-8b", Q_V, 16, 6_815_744),
    ("llama-3-8b", LLAMA, 16, 13_631_488),
    ("llama-3-8b", ALL, 8, 20_971_520),
    ("llama-3-8b", ALL, 16, 41_943_040),
    ("llama-3-8b", ALL, 64, 167_772_160),
    ("llama-3-8b", ALL, 256, 671_088_640),
    ("llama-65b", ALL, 64, 799_539_200),
    ("gpt2-medium", FUSED, 4, 393_216),
    ("gpt2-large", FUSED, 4, 737_280),
    ("roberta-base", ("query", "value"), 8, 294_912),
    ("roberta-large", ("query", "value"), 8, 786_432),
    ("deberta-xxl", ("query_proj", "value_proj"), 8, 2_359_296),
    ("deberta-xxl", ("query_proj", "value_proj"), 16, 4_718_592),
]


def describe(name: str, folder: Path) -> Path:
    """Write a model's `config.json`, and nothing else, to a directory of its name."""
    shape = SHAPES[name]
    path = folder / name
    path.mkdir()
    values = {**shape.config.to_dict(), "architectures": [shape.architecture]}
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return path


def arguments(targets: tuple[str, ...], rank: int) -> list[str]:
    chosen = ["--rank", str(rank), "--targets", ",".join(targets)]
    if targets is FUSED:
        chosen[-1:] = ["c_attn", "--set", "adapter.slices={c_attn: [true, false, true]}"]
    return chosen


@pytest.mark.parametrize(("name", "targets", "rank", "count"), COUNTS)
def test_counts(name: str, targets: tuple[str, ...], rank: int, count: int, tmp_path: Path) -> None:
    spoken = call("targets", describe(name, tmp_path), *arguments(targets, rank), "--offline", "--json")
    assert spoken.code == 0, spoken.err
    shown = json.loads(spoken.out)
    assert shown["trainable_parameters"] == count
    known = SHAPES[name].parameters
    assert known is None or shown["base_parameters"] == known
    assert shown["total_parameters"] == shown["base_parameters"] + count
    # files spread slices over their whole layer, with zeros elsewhere: B [3d, 2r] instead of [2d, r], A [2r, d]
    stored = 2 * count if targets is FUSED else count
    assert shown["stored_parameters"] == stored
    assert shown["file_bytes"] == {"float32": 4 * stored, "bfloat16": 2 * stored}


@pytest.mark.parametrize(
    ("name", "targets", "rank", "words"),
    [
        ("llama-2-7b", Q_V, 8, "64 layers, 4,194,304 trainable parameters: 0.0622 % of 6,742,609,920, base and adap"),
        ("llama-65b", ALL, 64, "560 layers, 799,539,200 trainable parameters: 1.21 % of 66,085,199,872, base and ad"),
        ("gpt2-medium", FUSED, 4, "24 layers, 393,216 trainable parameters: 0.111 % of 355,216,384, base and adapter"),
    ],
)
def test_what_is_printed(name: str, targets: tuple[str, ...], rank: int, words: str, tmp_path: Path) -> None:
    spoken = call("targets", describe(name, tmp_path), *arguments(targets, rank), "--offline")
    assert words in spoken.out


def test_a_head_trained_whole_counts(tmp_path: Path) -> None:
    """RoBERTa-base with the classifier of MNLI: 0.3M in the paper's table, 0.8M in its code's README; both are true."""
    config = SHAPES["roberta-base"].config.to_dict() | {"num_labels": 3}
    config |= {"architectures": ["RobertaForSequenceClassification"], "id2label": dict.fromkeys("012", "x")}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = ["--set", "adapter.modules_to_save=[classifier]"]
    spoken = call("targets", tmp_path, *arguments(("query", "value"), 8), *whole, "--offline", "--json")
    assert json.loads(spoken.out)["trainable_parameters"] == 294_912 + 592_899
