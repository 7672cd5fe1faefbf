"""Which modules a LoraConfig means: PEFT's rules, and errors for what PEFT passes over."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from pairs import config, tiny_gpt2
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIR_DEFAULTS
from tiny import tiny_llama
from torch import nn

from sideroad.errors import ConfigError, TargetError
from sideroad.peft import LoraConfig, get_peft_model, inject_adapter_in_model
from sideroad.peft.default_targets import default_names


class Siblings(nn.Module):
    """Names that contain each other, and a module that cannot be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.lin1 = nn.Linear(8, 8)
        self.a_lin = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.a_lin(self.lin1(self.lin(x))))
        return y


class Stacks(nn.Module):
    """Two stacks of blocks, one of them at the root, where PEFT's rule for block numbers does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2))
        self.inner = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2))})


def ours(make: Callable[[], nn.Module], **fields: Any) -> dict[str, int]:
    model = inject_adapter_in_model(LoraConfig(**{"r": 4, **fields}), make())
    return {n.removesuffix(".lora.default.A"): p.shape[0] for n, p in model.named_parameters() if n.endswith(".A")}


def theirs(make: Callable[[], nn.Module], **fields: Any) -> dict[str, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.inject_adapter_in_model(peft.LoraConfig(**{"r": 4, **fields}), make())
    end = ".lora_A.default.weight"
    return {n.removesuffix(end): p.shape[0] for n, p in model.named_parameters() if n.endswith(end)}


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}),
        (tiny_llama, {"target_modules": ["model.layers.1.mlp.up_proj", "self_attn.k_proj"]}),
        (tiny_llama, {"target_modules": r".*\.(q|k)_proj"}),
        (tiny_llama, {"target_modules": "model.layers.0.mlp.up_proj"}),
        (tiny_llama, {"target_modules": "all-linear"}),
        (tiny_llama, {"target_modules": "ALL-LINEAR", "exclude_modules": ["down_proj"]}),
        (tiny_llama, {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}),
        (tiny_llama, {}),
        (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
        (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": 0, "exclude_modules": ["0.mlp.up_proj"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.0\..*": 2, "v_proj": 3}}),
        (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"model.layers.1.self_attn.q_proj": 2}}),
        (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"]}),
        (tiny_gpt2, {"target_modules": "all-linear"}),
        (tiny_gpt2, {}),
        (Siblings, {"target_modules": ["lin"]}),
        (Stacks, {"target_modules": ["lin"], "layers_to_transform": [1]}),
        (Stacks, {"target_modules": ["lin"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        (Siblings, {"target_modules": "lin"}),
        (Siblings, {"target_modules": "lin."}),
        (Siblings, {"target_modules": "all-linear"}),
    ],
)  # fmt: skip
def test_6_and_44_the_same_modules_and_ranks_as_pefts(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    expected = theirs(make, **fields)
    assert expected
    assert ours(make, **fields) == expected


def random_model(kind: str) -> nn.Module:
    """A random model of a transformers model type, small where its configuration has the usual names; on meta."""
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
        "n_embd": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "num_key_value_heads": 2, "num_kv_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32, "head_dim": 8,
        "rotary_dim": 4,
    }  # fmt: skip
    settings = transformers.AutoConfig.for_model(kind)
    for name, value in shape.items():
        if hasattr(settings, name) and not isinstance(getattr(type(settings), name, None), property):
            setattr(settings, name, value)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = transformers.AutoModel.from_config(settings)
    return made


QUICK = (
    "t5", "mt5", "bart", "gpt2", "bloom", "opt", "gptj", "gpt_neox", "gpt_neo", "bert", "roberta", "xlm-roberta",
    "electra", "deberta-v2", "deberta", "layoutlm", "llama", "gpt_bigcode", "mpt", "falcon", "codegen", "mistral",
    "mixtral", "stablelm", "phi", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "rwkv", "llama4", "nemotron_h",
    "blip-2",
)  # fmt: skip
"""Model types of PEFT's table that transformers has and builds at once."""


@pytest.mark.parametrize("kind", QUICK)
def test_44_without_targets_the_same_modules_as_pefts_table(kind: str) -> None:
    model = random_model(kind)
    chosen = default_names(name for name, _ in model.named_modules())
    assert chosen is not None
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(chosen) == set(THEIR_DEFAULTS[kind]) & last


def test_without_targets_and_without_usual_names_the_layers_are_listed() -> None:
    with pytest.raises(TargetError, match=r"has no layers of the usual names to choose\. Layers found: lin, lin1"):
        ours(Siblings)


def test_d12_a_name_that_matches_nothing_is_an_error_with_the_nearest() -> None:
    fields = {"target_modules": ["q_proj", "v_porj"], "exclude_modules": ["nothing"]}
    with pytest.raises(TargetError, match="2 problems") as caught:
        ours(tiny_llama, **fields)
    assert 'target_modules: "v_porj" matches no module of LlamaForCausalLM. Did you mean "v_proj"?' in str(caught.value)
    assert 'exclude_modules: "nothing" matches no module' in str(caught.value)
    assert "allow_unmatched=True" in str(caught.value)
    found = ours(tiny_llama, **fields, allow_unmatched=True)
    assert found == theirs(tiny_llama, **fields)


def test_d12_a_key_of_a_pattern_that_matches_nothing_is_an_error() -> None:
    fields = {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}
    with pytest.raises(TargetError, match='rank_pattern: "v_proj" matches none of the adapted modules'):
        ours(tiny_llama, **fields)
    assert ours(tiny_llama, **fields, allow_unmatched=True) == theirs(tiny_llama, **fields)


def test_nothing_left_is_an_error_even_where_unmatched_names_are_allowed() -> None:
    with pytest.raises(TargetError, match=r"target_modules \['nope'\] mean no module of LlamaForCausalLM"):
        ours(tiny_llama, target_modules=["nope"], allow_unmatched=True)
    with pytest.raises(TargetError, match="mean no module"):
        ours(tiny_llama, target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(TargetError, match="mean no module"):
        ours(tiny_llama, target_modules=["lm_head"], modules_to_save=["lm_head"])


def test_d13_a_string_is_one_expression_and_never_split_into_characters() -> None:
    with pytest.raises(TargetError, match=r"target_modules 'q_proj' mean no module.*for names give \['q_proj'\]"):
        ours(tiny_llama, target_modules="q_proj")
    with pytest.raises(TargetError, match=r"for names give \['q_proj', 'v_proj'\]"):
        ours(tiny_llama, target_modules="q_proj, v_proj")


def test_a_module_that_cannot_be_adapted_is_an_error_with_its_kind() -> None:
    with pytest.raises(TargetError, match=r"target_modules mean norm \(LayerNorm\), which cannot be adapted"):
        ours(Siblings, target_modules=["lin", "norm"])
    with pytest.raises(TargetError, match=r"mean model.layers.0.self_attn \(LlamaAttention\)"):
        ours(tiny_llama, target_modules=r".*self_attn.*")


def test_the_head_of_a_classification_is_left_out_of_all_linear() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        settings = transformers.BertConfig(vocab_size=50, num_labels=9, **shape)
        made: nn.Module = transformers.BertForSequenceClassification(settings)
        return made

    whole = ours(make, target_modules="all-linear")
    assert set(whole) == set(theirs(make, target_modules="all-linear"))
    assert "classifier" in whole


def test_the_users_configuration_is_not_changed_and_the_models_says_what_was_chosen() -> None:
    mine = LoraConfig(r=4)
    before = copy.deepcopy(mine)
    model = get_peft_model(tiny_llama(), mine)
    assert mine == before
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.peft_config["default"].target_modules == names


def test_a_configuration_of_pefts_is_refused_with_the_import_to_change() -> None:
    with pytest.raises(ConfigError, match=r"peft.tuners.lora.config.LoraConfig; allowed: sideroad.peft.LoraConfig"):
        get_peft_model(tiny_llama(), peft.LoraConfig())
    with pytest.raises(ConfigError, match="mixed=True"):
        get_peft_model(tiny_llama(), config(), mixed=True)


def test_a_state_dict_can_say_the_modules() -> None:
    keys = {f"model.layers.{n}.mlp.up_proj.lora_A.weight": torch.zeros(1) for n in (0, 1)}
    model = inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), tiny_llama(), "x", state_dict=keys)
    found = {name for name, _ in model.named_parameters() if ".lora.x.A" in name}
    assert found == {f"model.layers.{n}.mlp.up_proj.lora.x.A" for n in (0, 1)}
    with pytest.raises(TargetError, match="nope"):
        inject_adapter_in_model(LoraConfig(r=3), tiny_llama(), state_dict={"nope.lora_A.weight": torch.zeros(1)})
