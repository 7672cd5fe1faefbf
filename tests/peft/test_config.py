"""LoraConfig: PEFT's fields and defaults, and an error for what would be accepted in silence."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

from sideroad.errors import AdapterError, ConfigError
from sideroad.peft import EvaConfig, LoraConfig, PeftConfig, PeftType, TaskType, get_peft_config

THEIRS = {one.name: one for one in dataclasses.fields(peft.LoraConfig)}
VALUES: dict[str, Any] = {
    "megatron_config": {"a": 1}, "megatron_core": "other", "loftq_config": {"bits": 4},
    "corda_config": {"a": 1}, "lora_ga_config": {"a": 1},
    "velora_config": {"a": 1}, "alora_invocation_tokens": [], "use_qalora": True, "qalora_group_size": 8,
    "monteclora_config": {"a": 1}, "layer_replication": [(0, 1)], "runtime_config": object(), "lora_bias": True,
    "use_bdlora": {"a": 1}, "arrow_config": {"a": 1}, "kasa_config": {"a": 1},
}  # fmt: skip
SUPPORTED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying", "use_dora", "eva_config", "target_parameters",
}  # fmt: skip


def test_every_field_of_pefts_is_known_in_its_order_with_its_default() -> None:
    ours = {one.name: one for one in dataclasses.fields(LoraConfig)}
    assert set(ours) - set(THEIRS) == {"allow_unmatched"}
    positional = [name for name in ours if name in THEIRS]
    assert positional[:10] == list(THEIRS)[:10]
    made, expected = LoraConfig(), peft.LoraConfig()
    differing = {name for name in THEIRS if getattr(made, name) != getattr(expected, name)}
    assert differing == {"peft_version", "runtime_config"}


def test_every_field_is_supported_or_refused_by_name() -> None:
    """A field of PEFT's that is neither would be accepted and ignored."""
    assert SUPPORTED | set(VALUES) == set(THEIRS)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_field_that_is_not_supported_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is set .*not supported yet"):
        LoraConfig(**{name: VALUES[name]})


def test_an_unknown_field_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r'no field "target_module". Did you mean "target_modules"'):
        LoraConfig(target_module=["q_proj"])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r is 0; the rank is a whole number from 1 on"),
        ({"r": 2.5}, "r is 2.5"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; a LoraConfig has LORA"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a finite number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it is a probability"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"bias": "lora"}, 'bias is \'lora\'; allowed: none, lora_only, all. Did you mean "lora_only"'),
        ({"task_type": "CAUSAL"}, 'task_type is \'CAUSAL\'.*Did you mean "CAUSAL_LM"'),
        ({"layers_pattern": "layers", "target_modules": ["q"]}, "layers_pattern is 'layers' without layers_to_transf"),
        ({"layers_to_transform": [0], "target_modules": "q.*"}, "layers_to_transform is set, but target_modules is th"),
        ({"layers_pattern": "h", "layers_to_transform": 1, "target_modules": ".*q"}, "layers_pattern is set, but targ"),
        ({"layers_to_transform": [-1], "target_modules": ["q"]}, "blocks are counted from 0"),
        ({"target_modules": []}, "target_modules is empty, so nothing would be adapted"),
        ({"target_modules": "*.q_proj"}, "target_modules is '\\*.q_proj', which is not a regular expression"),
        ({"target_modules": [1, 2]}, r"target_modules is \[1, 2\]; expected a list of names"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0; expected a whole number from 1 on"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern\['\('\] is '\(', which is not a regular expression"),
        ({"alpha_pattern": {"q": "4"}}, r"alpha_pattern\['q'\] is '4'; expected a finite number"),
        ({"trainable_token_indices": [1.5]}, r"trainable_token_indices is \[1.5\]; expected a list of token ids"),
        ({"trainable_token_indices": {"e": [1, 1]}}, r"trainable_token_indices is .*; .*none twice"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected True or False"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected a list of names"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights is 'pissa_niter_4' \(PiSSA.*not supported yet"),
        ({"init_lora_weights": "gausian"}, 'not known; allowed: True, False, "gaussian", .*Did you mean "gaussian"'),
        ({"init_lora_weights": "pisa"}, 'which is not known; .*"pissa", "pissa_niter_16", .*Did you mean "pissa"'),
        ({"init_lora_weights": ["pissa"]}, r"init_lora_weights is \['pissa'\], which is not known"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1, which is not known"),
        ({"use_dora": 1}, "use_dora is 1; expected True or False"),
        ({"eva_config": {"rho": 2}}, "eva_config is set, but init_lora_weights is True; set that to 'eva', or leave"),
        ({"eva_config": 3, "init_lora_weights": "eva"}, "eva_config is 3; expected an EvaConfig, its fields, or None"),
        ({"ensure_weight_tying": True, "init_lora_weights": "olora"}, "tying is set, and init_lora_weights is 'olora'"),
    ],
)
def test_a_contradiction_is_an_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**fields)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "orthogonal", "mica"])
def test_a_start_that_is_not_there_is_refused_by_its_name(init: str) -> None:
    with pytest.raises(ConfigError, match=f"init_lora_weights is '{init}'.*not supported yet"):
        LoraConfig(init_lora_weights=init)


def test_all_findings_come_at_once() -> None:
    with pytest.raises(ConfigError, match="5 problems") as caught:
        LoraConfig(r=0, lora_dropout=2, lora_bias=True, layers_pattern="h", init_lora_weights="mica")
    for word in ("r is 0", "lora_dropout is 2", "lora_bias", "layers_pattern", "init_lora_weights"):
        assert word in str(caught.value)


def test_it_is_mutable_and_a_plain_value() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config.r = 3
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert config.to_dict()["r"] == 3
    assert config.target_modules == {"q_proj"}
    config.lora_dropout = 7
    with pytest.raises(ConfigError, match="lora_dropout is 7"):
        config.check()


def test_task_and_kind_are_enum_members_that_equal_their_words() -> None:
    config = LoraConfig(task_type="CAUSAL_LM")
    assert config.task_type is TaskType.CAUSAL_LM
    assert config.task_type == "CAUSAL_LM" == peft.TaskType.CAUSAL_LM
    assert config.peft_type is PeftType.LORA
    assert LoraConfig(task_type=peft.TaskType.SEQ_CLS).task_type is TaskType.SEQ_CLS
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt


def test_files_go_both_ways_and_hold_the_same(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "r": 3, "lora_alpha": 5, "target_modules": ["b", "a"], "task_type": "CAUSAL_LM", "bias": "all",
        "rank_pattern": {"a": 2}, "init_lora_weights": "gaussian", "use_rslora": True, "revision": "main",
    }  # fmt: skip
    LoraConfig(**fields).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**fields).save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = peft.LoraConfig.from_pretrained(str(tmp_path / "ours"))
    assert read == peft.LoraConfig(**fields)
    back = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert isinstance(back, LoraConfig)
    assert {name: getattr(back, name) for name in fields} == {**fields, "target_modules": {"a", "b"}}
    assert LoraConfig.from_pretrained(tmp_path, subfolder="ours") == LoraConfig(**fields)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "eva"])
def test_a_new_start_and_dora_go_through_files_of_configurations(init: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q"], "init_lora_weights": init, "use_dora": True}
    LoraConfig(**fields).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert peft.LoraConfig.from_pretrained(str(tmp_path)) == peft.LoraConfig(**fields)
    back = LoraConfig.from_pretrained(tmp_path)
    assert (back.init_lora_weights, back.use_dora) == (init, True)
    back.check()


def test_evas_options_are_ours_pefts_or_plain() -> None:
    made = [
        LoraConfig(init_lora_weights="eva", eva_config=one).eva_config
        for one in (EvaConfig(rho=3), peft.EvaConfig(rho=3), {"rho": 3})
    ]
    assert made == [EvaConfig(rho=3)] * 3
    assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    mine, theirs = ({one.name: one.default for one in dataclasses.fields(kind)} for kind in (EvaConfig, peft.EvaConfig))
    assert mine == theirs


def test_a_finished_adapter_may_have_started_in_ways_a_new_one_cannot(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(target_modules=["q"], init_lora_weights="orthogonal", r=4)
    theirs.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.init_lora_weights == "orthogonal"
    with pytest.raises(ConfigError, match="init_lora_weights is 'orthogonal'"):
        config.check()


def test_a_file_that_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "r": 0, "lora_bias": True}))
    with pytest.raises(AdapterError, match="3 problems") as caught:
        PeftConfig.from_pretrained(tmp_path)
    for word in ("peft_type is 'IA3'", "lora_bias", "r is 0"):
        assert word in str(caught.value)


def test_a_repository_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROAD_OFFLINE", "1")
    with pytest.raises(AdapterError, match=r"there is no adapter at someone/some-lora: it is no local directory"):
        PeftConfig.from_pretrained("someone/some-lora")


def test_kinds_are_made_by_name() -> None:
    assert get_peft_config({"peft_type": "LORA", "r": 3}) == LoraConfig(r=3)
    assert PeftConfig.from_peft_type(peft_type=PeftType.LORA, r=3) == LoraConfig(r=3) == LoraConfig.from_peft_type(r=3)
    with pytest.raises(ConfigError, match="peft_type is 'VERA'"):
        get_peft_config({"peft_type": "VERA"})
    with pytest.raises(ConfigError, match="have no peft_type"):
        get_peft_config({"r": 3})
