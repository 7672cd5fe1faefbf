"""adapter_config.json of any PEFT version, to our configuration and back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sideroad.config import AdapterConfig, LoraMethod
from sideroad.peft_format import read_config, write_config
from sideroad.peft_keys import Sorted
from sideroad.scaling import scale
from sideroad.targets import alpha_of, matches, rank_of

LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
PATHS = tuple(f"model.layers.{n}.{leaf}" for n in (0, 1, 10) for leaf in LEAVES)
NAMES = ["q_proj", "v_proj", "up_proj"]
MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": NAMES}
RANKS = dict.fromkeys(PATHS, 4)


def reading(changes: dict[str, Any], ranks: dict[str, int] = RANKS, **options: Any) -> Any:
    return read_config({**MINIMAL, **changes}, ranks, **options)


def finding(changes: dict[str, Any], **options: Any) -> str:
    found = reading(changes, **options).findings
    assert len(found) == 1, found
    return str(found[0])


def written(config: AdapterConfig, ranks: dict[str, int] = RANKS, **foreign: Any) -> dict[str, Any]:
    return write_config(config, ranks, task_type="CAUSAL_LM", base_name="b", foreign=foreign)


def round_trip(changes: dict[str, Any], ranks: dict[str, int] = RANKS) -> dict[str, Any]:
    found = reading(changes, ranks)
    assert not found.findings
    return written(found.config, ranks, **found.foreign)


def test_known_fields_are_mapped() -> None:
    found = reading({
        "lora_alpha": 12, "use_rslora": True, "lora_dropout": 0.1, "bias": "lora_only", "task_type": "SEQ_CLS",
        "base_model_name_or_path": "a/b", "init_lora_weights": "gaussian", "exclude_modules": ["lm_head"],
        "layers_to_transform": [0, 1, 10], "layers_pattern": "layers", "inference_mode": False,
    })  # fmt: skip
    config = found.config
    assert found.findings == ()
    assert (found.task_type, found.base_name, dict(found.foreign)) == ("SEQ_CLS", "a/b", {})
    assert config.method == LoraMethod(rank=4, alpha=12, dropout=0.1, scaling="alpha/sqrt(r)", init="gaussian")
    assert (config.targets, config.exclude, config.bias) == (tuple(NAMES), ("lm_head",), "adapted")
    assert (config.layers, config.layers_pattern) == ((0, 1, 10), "layers")


def test_defaults_of_absent_fields_are_pefts() -> None:
    config = read_config({"peft_type": "LORA", "target_modules": NAMES}, dict.fromkeys(PATHS, 8)).config
    assert (config.method.rank, config.method.alpha, config.method.dropout) == (8, 8.0, 0.0)


def test_the_smallest_file_is_written() -> None:
    config = AdapterConfig(targets=("q_proj", "v_proj", "up_proj"), method=LoraMethod(rank=4, alpha=8))
    assert written(config) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "b", "inference_mode": True,
        "r": 4, "lora_alpha": 8, "target_modules": NAMES,
    }  # fmt: skip
    assert type(written(config)["lora_alpha"]) is int


def test_everything_said_survives_both_ways() -> None:
    fields = {
        "lora_alpha": 12.5, "use_rslora": True, "lora_dropout": 0.1, "bias": "all", "init_lora_weights": "gaussian",
        "exclude_modules": r".*\.vision\..*", "layers_to_transform": [0, 1, 10], "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"mlp.up_proj": 3},
    }  # fmt: skip
    ranks = {path: 2 if "q_proj" in path else 3 if ".1.mlp" in path else 4 for path in PATHS}
    again = round_trip(fields, ranks)
    assert {name: again[name] for name in fields} == fields


@pytest.mark.parametrize(
    "target",
    [r".*\.(q_proj|v_proj|up_proj)", r"model\.layers\.\d+\..*proj", NAMES, ["self_attn.q_proj", "v_proj", "up_proj"]],
)
def test_targets_survive_both_ways(target: Any) -> None:
    config = reading({"target_modules": target}).config
    assert all(any(matches(pattern, path) for pattern in config.targets) for path in PATHS)
    assert round_trip({"target_modules": target})["target_modules"] == target


@pytest.mark.parametrize("target", ["all-linear", "All-Linear"])
def test_all_linear_is_ours_and_is_written_as_names(target: str) -> None:
    assert reading({"target_modules": target}).config.targets == "all-linear"
    assert round_trip({"target_modules": target})["target_modules"] == sorted(NAMES)


def test_all_linear_of_two_towers_is_written_with_parents() -> None:
    paths = ("language.layers.0.mlp.proj", "visual.blocks.0.attn.proj", "head.0")
    config = AdapterConfig(targets="all-linear", method=LoraMethod(rank=4))
    assert written(config, dict.fromkeys(paths[:2], 4))["target_modules"] == ["attn.proj", "mlp.proj"]
    assert written(config, dict.fromkeys(paths, 4))["target_modules"] == list(paths)


@pytest.mark.parametrize("target", [None, [], ["", *PATHS]])
def test_no_target_means_the_modules_that_have_tensors(target: Any) -> None:
    assert reading({"target_modules": target}).config.targets == PATHS


def test_names_that_look_like_patterns_are_quoted() -> None:
    config = reading({"target_modules": [*NAMES, "odd*", "all-linear", "re:x"]}).config
    assert config.targets[3:] == (r"re:(.*\.)?odd\*", r"re:(.*\.)?all\-linear", r"re:(.*\.)?re:x")
    assert matches(config.targets[3], "model.odd*")
    assert not matches(config.targets[3], "model.odds")
    assert round_trip({"target_modules": [*NAMES, "odd*"]})["target_modules"] == [*NAMES, "odd*"]


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": "*.layers.*"},
        {"targets": ("q_proj", "re:.*")},
        {"targets": "all-linear", "layers": (0, 1, 10)},
        {"targets": "all-linear", "exclude": ("lm_head",)},
        {"targets": tuple(NAMES), "layers": "0-"},
        {"targets": tuple(NAMES), "exclude": ("*.vision.*",)},
        {"targets": tuple(NAMES), "exclude": ("lm_head", "re:x")},
        {"targets": ("q_proj",)},
    ],
)
def test_what_peft_cannot_say_becomes_the_list_of_modules(changes: dict[str, Any]) -> None:
    fields = written(AdapterConfig(**changes, method=LoraMethod(rank=4)))
    assert fields["target_modules"] == list(PATHS)
    assert not {"exclude_modules", "layers_to_transform", "layers_pattern"} & set(fields)


def test_layers_with_an_exact_path_or_several_lists_become_exact() -> None:
    ranks = dict.fromkeys(PATHS[:4], 4)
    mixed = {"target_modules": [*NAMES, PATHS[3]], "layers_to_transform": 0}
    assert reading(mixed, ranks).config.targets == PATHS[:4]
    several = {"layers_to_transform": [0, 1, 10], "layers_pattern": ["h", "layers"]}
    assert reading(several).config.targets == PATHS


@pytest.mark.parametrize(
    "key", ["q_proj", "self_attn.q_proj", r"model\.layers\.\d+\.self_attn\.q_proj", ".*q_.*", "q.proj"]
)
def test_pattern_keys_match_as_pefts_do(key: str) -> None:
    ranks = {path: 2 if re.match(rf"(.*\.)?({key})$", path) else 4 for path in PATHS}
    found = reading({"rank_pattern": {key: 2}, "alpha_pattern": {key: 5}}, ranks)
    assert not found.findings
    assert {path: rank_of(found.config, path) for path in PATHS} == ranks
    assert {path: alpha_of(found.config, path) for path in PATHS} == {p: 5 if r == 2 else 8 for p, r in ranks.items()}
    assert round_trip({"rank_pattern": {key: 2}}, ranks)["rank_pattern"] == {key: 2}


def test_a_dot_that_matters_stays_a_regular_expression() -> None:
    ranks = {"m.a.b": 2, "m.axb": 2}
    found = read_config({**MINIMAL, "target_modules": ["a.b", "axb"], "rank_pattern": {"a.b": 2}}, ranks)
    assert not found.findings
    assert list(found.config.rank_pattern) == [r"re:(.*\.)?(a.b)"]


def test_ranks_are_written_from_the_tensors() -> None:
    config = AdapterConfig(targets=tuple(NAMES), method=LoraMethod(rank=99, alpha=8), alpha_pattern={"*.1.*": 3})
    by_leaf = {path: 2 if "v_proj" in path else 4 for path in PATHS}
    assert (written(config, by_leaf)["r"], written(config, by_leaf)["rank_pattern"]) == (4, {"v_proj": 2})
    by_path = {path: 2 if path == PATHS[0] else 4 for path in PATHS}
    assert written(config, by_path)["rank_pattern"] == {PATHS[0]: 2}
    again = read_config(written(config, by_path), by_path)
    assert not again.findings
    assert {p: scale(again.config, p, r) for p, r in by_path.items()} == {
        p: scale(config, p, r) for p, r in by_path.items()
    }


def test_overlapping_patterns_keep_their_meaning_when_a_reader_sorts_them() -> None:
    patterns = {"re:.*v_proj": 3, "*v_proj": 1, "mlp.up_proj": 2, "*.up_proj": 1}
    ranks = {path: 3 if "v_proj" in path else 2 if "up_proj" in path else 4 for path in PATHS}
    config = AdapterConfig(targets=tuple(NAMES), method=LoraMethod(rank=4), rank_pattern=patterns)
    fields = written(config, ranks)
    fields["rank_pattern"] = dict(sorted(fields["rank_pattern"].items()))
    assert not read_config(fields, ranks).findings
    assert fields["rank_pattern"] == {"up_proj": 2, "v_proj": 3}


REFUSED = {
    "lora_bias": True, "layer_replication": [[0, 2]], "alora_invocation_tokens": [],
    "use_qalora": True, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1}, "velora_config": {"scale": 1},
    "kasa_config": {"beta": 1}, "monteclora_config": {"num_samples": 1}, "enable_lora": [True, False, True],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_change_the_maths_are_refused_by_name(name: str) -> None:
    assert re.search(rf"{name} is set \(.*\): .*changes what the adapter computes", finding({name: REFUSED[name]}))
    off = None if name == "alora_invocation_tokens" else type(REFUSED[name])()
    for unset in (None, off):
        found = reading({name: unset})
        assert (found.findings, dict(found.foreign)) == ((), {})


def test_all_refusals_come_at_once() -> None:
    assert len(reading({**REFUSED, "r": 0, "init_lora_weights": "pissa", "bias": "some"}).findings) == len(REFUSED) + 3


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_inits_that_rewrote_the_base_are_refused(init: str) -> None:
    assert "path_initial_model_for_weight_conversion" in finding({"init_lora_weights": init})


@pytest.mark.parametrize("init", [True, None, "gaussian", False, "eva", "orthogonal", "mica"])
def test_other_inits_are_kept(init: Any) -> None:
    again = round_trip({"init_lora_weights": init})
    assert again.get("init_lora_weights", True) == (True if init is None else init)


def test_unknown_init_is_named() -> None:
    assert "is 'guassian', which is not known. Did you mean \"gaussian\"?" in finding({"init_lora_weights": "guassian"})


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_field_that_is_not_set_is_kept(value: Any) -> None:
    found = reading({"use_novelty": value})
    assert (found.findings, dict(found.foreign)) == ((), {"use_novelty": value})
    assert round_trip({"use_novelty": value})["use_novelty"] == value


def test_unknown_field_that_is_set_is_refused_unless_allowed() -> None:
    words = finding({"use_dorra": True})
    assert "unknown field use_dorra is set (True)" in words
    assert 'Did you mean "use_dora"?' in words
    assert 'Adapter.load(path, allow_unknown=("use_dorra",))' in words
    assert reading({"use_dorra": True}, allow_unknown=("use_dorra",)).foreign == {"use_dorra": True}
    assert reading({"use_dora": True}, allow_unknown=("use_dora",)).findings


def test_tying_says_nothing_that_the_tensors_do_not() -> None:
    for value in (True, False):
        found = reading({"ensure_weight_tying": value})
        assert (found.findings, dict(found.foreign)) == ((), {})


def test_a_head_that_follows_its_embedding_needs_no_target() -> None:
    ranks = {"embed": 2, "head": 2}
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    held = Sorted({"embed": {"A": A, "B": B}, "head": {"A": B.t(), "B": A.t()}}, kinds={"embed": "embedding"})
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["embed"], "ensure_weight_tying": True}
    assert not read_config(fields, ranks, held).findings
    assert "do not cover" in read_config({**fields, "ensure_weight_tying": False}, ranks, held).findings[0]
    other = Sorted({**held.weights, "head": {"A": B.t(), "B": A.t() + 1}}, kinds={"embed": "embedding"})
    assert "do not cover" in read_config(fields, ranks, other).findings[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modules_to_save": "score"}, "modules_to_save is 'score'; expected a list of names"),
        ({"modules_to_save": ["score"]}, "but the file holds no such module: what was trained in it is lost"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set, but the file holds no trained rows"),
        ({"trainable_token_indices": {"wte": ["a"]}}, "expected a list of ids, or a mapping to lists"),
    ],
)
def test_parts_that_the_file_lacks_are_named(fields: dict[str, Any], words: str) -> None:
    assert words in finding(fields)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "wte has trained rows, but trainable_token_indices is not set"),
        ({"embed": [1, 2]}, "wte has trained rows, but trainable_token_indices does not name it"),
        ([1, 2, 3], "wte has 2 trained rows, but trainable_token_indices lists 3 ids"),
        ({"wte": [4, 4]}, "lists 2 ids, some of them twice"),
    ],
)
def test_rows_and_their_ids_must_agree(said: Any, words: str) -> None:
    held = Sorted({"wte": {"rows": torch.zeros(2, 3)}})
    fields = {"peft_type": "LORA", "trainable_token_indices": said, "target_modules": []}
    assert words in read_config(fields, {}, held).findings[0]


def test_harmless_fields_are_kept_when_they_say_something() -> None:
    harmless = {"fan_in_fan_out": True, "revision": "main", "peft_version": "0.21.2", "megatron_config": {"a": 1},
                "auto_mapping": {"base_model_class": "X"}, "eva_config": {"rho": 2.0}}  # fmt: skip
    silent = {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}, "corda_config": None}
    assert dict(reading({**harmless, **silent}).foreign) == harmless
    assert harmless.items() <= round_trip(harmless).items()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "ADALORA"}, r"peft_type is 'ADALORA' \(pairs with singular values; .*\); only LORA"),
        ({"peft_type": "lora"}, 'Did you mean "LORA"'),
        ({"peft_type": ["LORA"]}, "only LORA files are read"),
        ({"r": 0}, "r is 0; expected a whole number of at least 1"),
        ({"r": True}, "r is True; expected a whole number"),
        ({"r": "8"}, "r is '8'; expected"),
        ({"r": None}, "r is None; expected"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a number above 0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; expected 0 or more, below 1"),
        ({"bias": "adapted"}, "bias is 'adapted'; allowed: none, lora_only, all"),
        ({"bias": ["all"]}, "bias is .* allowed: none, lora_only, all"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0; expected"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; expected a mapping"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a valid regular expression"),
        ({"target_modules": "("}, "target_modules: .* is not a valid regular expression"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; expected a list of names"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is .*expected a list of whole numbers"),
        ({"task_type": 1}, "task_type is 1; expected a string or null"),
        ({"target_modules": ["q_proj"]}, "do not cover modules that have tensors: .*v_proj.* and 3 more"),
        ({"exclude_modules": ["q_proj"]}, "do not cover modules that have tensors"),
        ({"layers_to_transform": [0]}, "do not cover modules that have tensors"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], words: str) -> None:
    assert re.search(words, finding(changes))


def test_rank_that_differs_from_the_tensors() -> None:
    found = reading({}, {**RANKS, PATHS[0]: 2}).findings
    assert len(found) == 1
    assert f"{PATHS[0]}: its tensors have rank 2 but adapter_config.json says 4" in found[0]


def test_not_an_adapter_config() -> None:
    assert "has no peft_type" in read_config({"architectures": []}, {}).findings[0]
