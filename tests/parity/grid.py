"""The grid of exchanges with PEFT: tiny models of many architectures, options, and either side's words for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pairwise import Case, covering, full, name
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sideroad.config import AdapterConfig, LoraMethod

WIDTH, VOCAB = 16, 31
IDS = torch.arange(2 * 6).reshape(2, 6) * 7 % VOCAB
TOKENS = (3, 7, 14)
"""Token ids whose rows are trained; all of them are in `IDS`."""


class Mlp(nn.Module):
    """Two residual blocks and a head that is a container; [batch, 16] to [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.ModuleDict({"up": nn.Linear(WIDTH, 24), "down": nn.Linear(24, WIDTH)}) for _ in range(2)]
        self.layers = nn.ModuleList(block)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Blocks, norm, head."""
        for block in self.layers.children():
            x = x + block.down(torch.tanh(block.up(x)))
        out: Tensor = self.head(self.norm(x))
        return out


class Convolutional(nn.Module):
    """Conv2d with stride and padding, in groups, and plain; a Conv1d; [batch, 4, 9, 9] to [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        first, grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, (3, 2), groups=2)
        self.body = nn.ModuleList([nn.ModuleDict({"conv": first}), nn.ModuleDict({"conv": nn.Conv2d(8, 8, 1)})])
        self.grouped, self.line = grouped, nn.Conv1d(8, 12, 2, stride=2)
        self.norm = nn.Sequential(nn.BatchNorm1d(12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, flatten the places, convolve, mean, head."""
        for block in self.body.children():
            x = torch.tanh(block.conv(x))
        out: Tensor = self.head(self.norm(torch.tanh(self.line(self.grouped(x).flatten(2)))).mean(-1))
        return out


class Attentive(nn.Module):
    """An embedding, two blocks of `nn.MultiheadAttention` and a linear layer, a head; ids to [batch, length, 31]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "mha": nn.MultiheadAttention(WIDTH, 2, batch_first=True), "lin": nn.Linear(WIDTH, WIDTH)
            }) for _ in range(2)
        )  # fmt: skip
        self.norm = nn.Sequential(nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up, attend, project."""
        x = self.words(ids)
        for block in self.layers.children():
            x = x + block.mha(x, x, x, need_weights=False)[0]
            x = x + functional.gelu(block.lin(x))
        out: Tensor = self.head(self.norm(x))
        return out


@dataclass(frozen=True)
class Subject:
    """A model with the names that the options need.

    Args:
        names: targets as a list.
        regex: targets as one regular expression for the whole path.
        whole: a module trained whole that is not the head; most have parts.
        exclude: regular expression of a layer among `names` that is left out.
        embedding: name of the embedding of tokens.
        inputs: of the forward.
        task: PEFT's task type.
        blocks: name of the list of blocks, where PEFT does not find it by itself.
        biased: some layers among `names` have a bias.
        head_target: the head may have a pair (PEFT makes those of classifiers `modules_to_save`).
    """

    make: Callable[[], nn.Module]
    names: tuple[str, ...]
    regex: str
    whole: str
    head: str
    exclude: str
    embedding: str | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: {"input_ids": IDS})
    task: str | None = None
    blocks: str | None = None
    biased: bool = True
    head_target: bool = False
    fan_in_fan_out: bool = False


def _small(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().eval()
            for path, one in [*model.named_parameters(), *model.named_buffers()]:
                if path.endswith(("bias", "running_mean")) and one.is_floating_point():
                    one.data.uniform_(-0.2, 0.2)
                elif path.endswith("running_var"):
                    one.data.uniform_(0.5, 1.5)
                elif one.ndim == 2 and one.is_floating_point() and one.std() < 0.05:
                    one.data *= 5  # at the usual start an adapter of one block hardly shows in the logits
        return model

    return made


_ENCODER: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24}
_MOE = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_SELF = ("self_attn", "embed_tokens", "lm_head")

SUBJECTS: dict[str, Subject] = {
    "llama": Subject(
        _small(lambda: tiny_llama(**_LLAMA)), ("q_proj", "v_proj", "down_proj"), r".*\.self_attn\.(k|o)_proj",
        "layers.0.mlp", "lm_head", r".*\.0\.self_attn\.q_proj", "embed_tokens", task="CAUSAL_LM",
        biased=False, head_target=True,
    ),
    "tied": Subject(
        _small(lambda: tiny_llama(**_LLAMA, tie_word_embeddings=True)), ("k_proj", "up_proj"), r".*\.1\..*_proj",
        "model.norm", "lm_head", r".*\.0\.self_attn\.k_proj", "embed_tokens", task="CAUSAL_LM",
        biased=False, head_target=True,
    ),
    "gpt2": Subject(
        _small(lambda: GPT2LMHeadModel(GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=16, bos_token_id=0, eos_token_id=0
        ))),
        ("c_attn", "mlp.c_proj"), r".*\.(attn\.c_proj|c_fc)", "h.1.ln_2", "lm_head", r".*\.0\.attn\.c_attn", "wte",
        task="CAUSAL_LM", head_target=True, fan_in_fan_out=True,
    ),
    "bert": Subject(
        _small(lambda: BertForSequenceClassification(BertConfig(**_ENCODER, vocab_size=VOCAB, intermediate_size=24))),
        ("query", "value", "output.dense"), r".*\.(key|intermediate\.dense)", "pooler", "classifier",
        r".*\.0\..*\.query", "word_embeddings",
    ),
    "t5": Subject(
        _small(lambda: T5ForConditionalGeneration(T5Config(**_T5, vocab_size=VOCAB))), ("q", "v", "wo"),
        r".*\.(k|wi)", "decoder.final_layer_norm", "lm_head", r"encoder\.block\.0\..*\.q", "embed_tokens",
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, task="SEQ_2_SEQ_LM",
        biased=False, head_target=True,
    ),
    "vit": Subject(
        _small(lambda: ViTForImageClassification(ViTConfig(
            **_ENCODER, intermediate_size=24, image_size=8, patch_size=4, num_labels=5
        ))),
        ("q_proj", "v_proj", "projection"), r".*\.(k_proj|fc1)", "patch_embeddings", "classifier",
        r".*\.0\..*\.q_proj", None, {"pixel_values": torch.linspace(-2, 2, 384).reshape(2, 3, 8, 8)},
    ),
    "moe": Subject(
        _small(lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**_LLAMA, **_MOE))),
        ("q_proj", "o_proj", "shared_expert.down_proj"), r".*\.(v_proj|shared_expert\.up_proj|shared_expert_gate)",
        "layers.1.mlp.shared_expert", "lm_head", r".*\.0\.self_attn\.q_proj", "embed_tokens", task="CAUSAL_LM",
        head_target=True,
    ),
    "conv": Subject(
        _small(Convolutional), ("conv", "grouped", "line"), r"(body\.\d\.conv|line|head)", "norm", "head",
        r"body\.1\.conv", None,
        {"x": torch.linspace(-2, 2, 648).reshape(2, 4, 9, 9).sin()}, blocks="body",
    ),
    "mlp": Subject(
        _small(Mlp), ("up", "down"), r"layers\.\d\.down", "head", "head.2", r"layers\.0\.up", None,
        {"x": torch.linspace(-2, 2, 48).reshape(3, WIDTH).sin()}, blocks="layers",
    ),
    "mha": Subject(
        _small(Attentive), ("mha", "lin"), r"layers\.\d\.mha", "norm", "head", r"layers\.0\.lin", "words",
        {"ids": IDS}, blocks="layers",
    ),
}  # fmt: skip

TIED = ("tied", "gpt2", "t5")
"""Models whose head holds the embedding's weight."""

AXES = {
    "model": tuple(SUBJECTS),
    "targets": ("names", "all-linear", "regex", "embedding", "head"),
    "scale": ("plain", "rslora", "patterns"),
    "bias": ("none", "lora_only", "all"),
    "beside": ("nothing", "head", "container", "rows"),
    "where": ("everywhere", "layers", "exclude"),
    "store": ("float32", "bfloat16", "embeddings"),
}
"""`store`: the base's dtype (the adapter's is float32), or PEFT's `save_embedding_layers=True` on a float32 base."""


def possible(case: Case) -> bool:
    """Whether both sides accept the combination, and it says something that another does not."""
    subject = SUBJECTS[case["model"]]
    targets, beside = case["targets"], case["beside"]
    if (targets == "embedding" or beside == "rows") and subject.embedding is None:
        return False
    if targets == "head" and (not subject.head_target or beside == "head"):
        return False
    if targets == "embedding" and beside == "rows":
        return False
    if targets == "all-linear" and case["model"] in ("conv", "mha"):
        # conv: the head alone, which is no target here; mha: test_an_output_projection_alone_counts_when_merged
        return False
    if case["where"] == "layers" and targets != "names":
        return False
    if case["bias"] != "none" and not subject.biased:
        return False
    return not (case["store"] == "embeddings" and subject.embedding is None)


MORE = (
    "tied-names-plain-none-rows-everywhere-embeddings",
    "gpt2-all-linear-rslora-all-rows-exclude-embeddings",
    "t5-names-patterns-none-rows-layers-embeddings",
)
"""Cases that went wrong once though every two of their values met in others."""


def chosen() -> list[Case]:
    """The default cases: every pair of values that is possible meets, and `MORE`."""
    return covering(AXES, possible) + [case for case in every() if name(case) in MORE]


def every() -> list[Case]:
    """The full product."""
    return [case for case in full(AXES) if possible(case)]


@cache
def _base(model: str) -> nn.Module:
    return SUBJECTS[model].make()


def base_of(case: Case) -> nn.Module:
    """A fresh copy of the case's base."""
    model = copy.deepcopy(_base(case["model"]))
    return model.to(torch.bfloat16) if case["store"] == "bfloat16" else model


def run(case: Case, model: nn.Module) -> Tensor:
    """Logits of the case's inputs."""
    inputs = SUBJECTS[case["model"]].inputs
    if case["store"] in ("bfloat16", "float64"):
        kind = getattr(torch, case["store"])
        inputs = {key: one.to(kind) if one.is_floating_point() else one for key, one in inputs.items()}
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def _dropout(case: Case) -> float:
    # the projections of nn.MultiheadAttention refuse dropout here and in PEFT
    return 0.0 if case["where"] == "everywhere" or case["model"] == "mha" else 0.1


def theirs(case: Case) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig`."""
    subject = SUBJECTS[case["model"]]
    listed = {
        "names": list(subject.names), "all-linear": "all-linear", "regex": subject.regex,
        "embedding": [subject.names[0], subject.embedding], "head": [subject.names[0], subject.head],
    }  # fmt: skip
    fields: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": listed[case["targets"]], "task_type": subject.task,
        "fan_in_fan_out": subject.fan_in_fan_out, "lora_dropout": _dropout(case), "bias": case["bias"],
        "use_rslora": case["scale"] != "plain",
    }  # fmt: skip
    if case["scale"] == "patterns":
        fields |= {"rank_pattern": {subject.names[0]: 2}, "alpha_pattern": {r".*\.1\..*": 3, subject.names[-1]: 9}}
    if case["where"] == "layers":
        fields |= {"layers_to_transform": [1], "layers_pattern": subject.blocks}
    if case["where"] == "exclude":
        fields["exclude_modules"] = subject.exclude
    if case["beside"] in ("head", "container"):
        fields["modules_to_save"] = [getattr(subject, "head" if case["beside"] == "head" else "whole")]
    if case["beside"] == "rows":
        plain = subject.task is None and case["model"] == "mha"
        fields["trainable_token_indices"] = {subject.embedding: list(TOKENS)} if plain else list(TOKENS)
    return fields


def ours(case: Case) -> AdapterConfig:
    """The same in our words."""
    subject = SUBJECTS[case["model"]]
    attention = ("out_proj",) if case["model"] == "mha" else ()
    regex = r"layers\.\d\.mha(\.out_proj)?" if attention else subject.regex
    listed: dict[str, Any] = {
        "names": (*subject.names, *attention), "all-linear": "all-linear", "regex": f"re:{regex}",
        "embedding": (subject.names[0], *attention, subject.embedding), "head": (subject.names[0], subject.head),
    }  # fmt: skip
    # a layer with one output has no pair of rank 4 here
    fields: dict[str, Any] = {"targets": listed[case["targets"]], "rank_pattern": {"shared_expert_gate": 1}}
    if case["scale"] == "patterns":
        ranks = dict.fromkeys((subject.names[0], *attention), 2)
        patterns = fields["rank_pattern"] | ranks
        fields |= {"rank_pattern": patterns, "alpha_pattern": {r"re:.*\.1\..*": 3, subject.names[-1]: 9}}
    if case["where"] == "layers":
        fields |= {"layers": (1,), "layers_pattern": subject.blocks}
    if case["where"] == "exclude":
        fields["exclude"] = (f"re:{subject.exclude}",)
    if case["model"] == "moe" and case["targets"] == "all-linear" and _dropout(case):
        # all-linear means the fused experts too, which have no branch to drop from; PEFT's leaves them out
        fields["exclude"] = (*fields.get("exclude", ()), "*.experts.*")
    if case["beside"] in ("head", "container"):
        fields["modules_to_save"] = (getattr(subject, "head" if case["beside"] == "head" else "whole"),)
    if case["beside"] == "rows":
        fields["trainable_tokens"] = {"shared" if case["model"] == "t5" else str(subject.embedding): TOKENS}
    method = LoraMethod(
        rank=4, alpha=6, dropout=_dropout(case), scaling="alpha/r" if case["scale"] == "plain" else "alpha/sqrt(r)"
    )
    bias: Any = {"none": "none", "lora_only": "adapted", "all": "all"}[case["bias"]]
    return AdapterConfig(method=method, bias=bias, allow_unmatched=True, **fields)
