"""Directories both ways between the front door and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from pairs import both, bytes_of, config, fill, logits, quiet, relative, same, tiny_gpt2, wrapped
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn

from sideroad.errors import AdapterError, ConfigError, MergeError
from sideroad.peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (tiny_llama, {}),
    (tiny_llama, {"target_modules": r".*\.(q|k)_proj", "use_rslora": True, "lora_alpha": 3}),
    (tiny_llama, {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "init_lora_weights": "gaussian"}),
    (tiny_llama, {"target_modules": None, "rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"v_proj": 7}}),
    (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "all", "lora_dropout": 0.1}),
    (tiny_llama, {"target_modules": ["q_proj", "lm_head"], "task_type": None}),
]


@pytest.mark.parametrize(("make", "fields"), CASES)
def test_7_files_go_both_ways_with_the_same_bits_and_logits(
    make: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = both(make, **fields)
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        read = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert relative(logits(read), logits(ours)) <= 1e-5
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == {name for name in other if not name.endswith("base_layer.weight")}
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    for name in ("ours", "theirs"):
        back = PeftModel.from_pretrained(make(), tmp_path / name)
        assert type(back).__name__ == type(theirs).__name__
        assert torch.equal(logits(back), logits(ours))
        assert not any(one.requires_grad for one in back.parameters())
        assert not back.training


def test_7_what_the_user_wrote_is_what_the_file_says(tmp_path: Path) -> None:
    for number, fields in enumerate(fields for make, fields in CASES if make is tiny_llama):
        wrapped(**fields).save_pretrained(tmp_path / str(number))
        said = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        for name, value in {**fields, "inference_mode": True, "peft_type": "LORA"}.items():
            if name == "target_modules" and value in (None, "all-linear"):
                assert isinstance(said[name], list)
                continue
            listed = name == "target_modules" and isinstance(value, list)
            assert said.get(name) == (sorted(value) if listed else value)
        assert "peft_version" not in said


def test_7_the_directory_holds_card_and_adapter_alone(tmp_path: Path) -> None:
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = "some/base"
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n")
    model.save_pretrained(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    front, text = (tmp_path / "README.md").read_text().removeprefix("---\n").split("---\n")
    said = yaml.safe_load(front)
    assert (said["license"], said["library_name"], said["base_model"]) == ("mit", "peft", "some/base")
    assert {"mine", "lora", "base_model:adapter:some/base"} <= set(said["tags"])
    assert text == "# Mine\n"
    assert model.peft_config["default"].inference_mode is False


def test_8_others_than_default_go_into_directories_of_their_names(tmp_path: Path) -> None:
    model = wrapped()
    model.add_adapter("b", config(target_modules=["k_proj"], r=2))
    model.add_adapter("c", config())
    fill(model, seed=3)
    model.save_pretrained(tmp_path, selected_adapters=["default", "b"])
    assert {one.name for one in tmp_path.iterdir() if one.is_dir()} == {"b"}
    back = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    back.load_adapter(tmp_path / "b", "b")
    for name in ("default", "b"):
        model.set_adapter(name)
        back.set_adapter(name)
        assert torch.equal(logits(back), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="b")), logits(back))
    with pytest.raises(AdapterError, match='no adapter is named "x"'):
        model.save_pretrained(tmp_path / "new", selected_adapters=["x"])
    assert not (tmp_path / "new").exists()


def test_a_directory_with_other_things_keeps_them_and_loses_what_is_stale(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_text("kept")
    (tmp_path / "sideroad.json").write_text('{"config": {"targets": ["k_proj"]}}')
    model = wrapped()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == "kept"
    assert not (tmp_path / "sideroad.json").exists()
    fill(model, seed=9)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file; give a directory"):
        model.save_pretrained(tmp_path / "file")


def test_d21_what_cannot_be_saved_leaves_the_old_files(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    next(one for name, one in model.named_parameters() if ".lora." in name).data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN or infinite"):
        model.save_pretrained(tmp_path)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_d22_what_is_trained_but_in_no_adapter_is_told(tmp_path: Path) -> None:
    model = wrapped()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 trainable parameters belong to no adapter .*lm_head.weight.*modules_to_"):
        model.save_pretrained(tmp_path)


def test_9_a_configuration_given_for_loading_counts(tmp_path: Path) -> None:
    ours, _ = both()
    ours.save_pretrained(tmp_path)
    doubled = config(lora_alpha=16)
    back = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=doubled)
    ours.set_scale("default", 2)
    assert relative(logits(back), logits(ours)) <= 1e-5
    with pytest.raises(AdapterError, match=r"its tensors have rank 4 but adapter_config.json says 3"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config(r=3))


def test_11_loading_with_little_memory_is_loading(tmp_path: Path) -> None:
    ours = wrapped()
    ours.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(back), logits(ours))
    made = inject_adapter_in_model(config(), tiny_llama(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(made, get_peft_model_state_dict(ours), low_cpu_mem_usage=True)
    assert torch.equal(logits(made), logits(ours))


def test_12_pickles_are_neither_read_nor_written(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(ConfigError, match="safe_serialization=False would write a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is a pickle, which can run code"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_14_embeddings_are_not_copied_and_a_copy_must_be_this_bases(tmp_path: Path) -> None:
    ours, theirs = both(target_modules=["lm_head", "q_proj"])
    with quiet():
        theirs.save_pretrained(tmp_path)
    assert any(name.endswith("base_layer.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(ours))
    with pytest.raises(AdapterError, match=r"lm_head: holds a copy of the base's weight .* made for another"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)
    with pytest.raises(ConfigError, match="save_embedding_layers is True; allowed: 'auto', False"):
        ours.save_pretrained(tmp_path, save_embedding_layers=True)


def test_15_a_gathered_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    model = wrapped()
    gathered = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model)
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name] * 2) for name in live)
    del gathered[next(name for name in gathered if name.endswith("lora.default.B"))]
    with pytest.raises(AdapterError, match=r"lora.default.B is missing in the state dict"):
        model.save_pretrained(tmp_path, state_dict=gathered)
    filtered = {name: one for name, one in model.named_parameters() if "lora_" in name}
    with pytest.raises(AdapterError, match=r"none of the 8 tensors.*must filter by \"\.lora\.\""):
        model.save_pretrained(tmp_path, state_dict=filtered)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_16_the_bases_state_dict_goes_out_and_in() -> None:
    model, other = wrapped(), tiny_llama(seed=5)
    plain = get_base_model_state_dict(model)
    assert same(plain, bytes_of(tiny_llama()))
    result = set_base_model_state_dict(model, other.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(other))
    partial = {**other.state_dict(), "x": torch.zeros(1)}
    del partial["lm_head.weight"]
    with pytest.raises(AdapterError, match=r"2 problems.*\n.*lm_head.weight is missing\n.*x is not the base's"):
        set_base_model_state_dict(model, partial)
    assert set_base_model_state_dict(model, partial, strict=False) == (["lm_head.weight"], ["x"])


def test_16_an_adapters_state_dict_has_pefts_names_and_the_models_memory() -> None:
    ours, theirs = both(target_modules="all-linear")
    found, expected = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert found.keys() == expected.keys()
    next(iter(found.values())).zero_()
    assert not next(one for name, one in ours.named_parameters() if ".lora." in name).any()
    assert get_peft_model_state_dict(torch.compile(ours)).keys() == expected.keys()  # type: ignore[arg-type]


def test_16_an_injected_adapters_names_are_pefts_too() -> None:
    mine = inject_adapter_in_model(config(), tiny_llama())
    with quiet():
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tiny_llama())
    named = get_peft_model_state_dict(mine)
    assert named.keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert not next(iter(named)).startswith("base_model.")
    assert set_peft_model_state_dict(mine, {name: tensor + 1 for name, tensor in named.items()}) == ([], [])
    with pytest.raises(AdapterError, match="this LlamaForCausalLM has no adapters"):
        get_peft_model_state_dict(tiny_llama())


def test_d11_a_state_dict_that_does_not_fit_is_refused_whole() -> None:
    model = wrapped()
    before = bytes_of(model)
    tensors = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model).items()}
    first, second, *_ = tensors
    wrong = {**tensors, first: tensors[first][:2]}
    del wrong[second]
    with pytest.raises(AdapterError, match="missing") as caught:
        set_peft_model_state_dict(model, wrong)
    assert "needed [4, 32]" in str(caught.value)
    with pytest.raises(AdapterError, match="no known tensor"):
        set_peft_model_state_dict(model, {**tensors, "base_model.model.x.lora_C.weight": tensors[first]})
    with pytest.raises(ConfigError, match="ignore_mismatched_sizes"):
        set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert same(bytes_of(model), before)
    assert set_peft_model_state_dict(model, tensors) == ([], [])
    assert torch.equal(get_peft_model_state_dict(model)[first], tensors[first])


def test_37_and_d18_loading_changes_no_other_adapters_gradients(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    flags = {name: one.requires_grad for name, one in model.named_parameters()}
    for name, wanted in (("frozen", False), ("learns", True)):
        model.load_adapter(tmp_path, name, is_trainable=wanted)
        assert {key: one.requires_grad for key, one in model.named_parameters() if key in flags} == flags
        new = {one.requires_grad for key, one in model.named_parameters() if f".lora.{name}." in key}
        assert new == {wanted}
        assert model.active_adapters == ["default"]
        assert model.peft_config[name].inference_mode is not wanted
    model.set_requires_grad("default", False)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert not any(one.requires_grad for key, one in model.named_parameters() if ".lora.default." in key)


def test_loading_onto_a_name_that_exists_overwrites_in_place_if_it_fits(tmp_path: Path) -> None:
    model, other = wrapped(), wrapped(lora_alpha=2)
    fill(other, seed=8)
    other.save_pretrained(tmp_path / "fits")
    wrapped(r=2).save_pretrained(tmp_path / "smaller")
    places = {name: one.data_ptr() for name, one in model.named_parameters()}
    assert model.train().load_adapter(tmp_path / "fits", "default") == ([], [])
    assert not model.training
    assert torch.equal(logits(model), logits(other))
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == places
    with pytest.raises(AdapterError, match=r"needed \[4, 32\]"):
        model.load_adapter(tmp_path / "smaller", "default")
    model.merge_adapter()
    with pytest.raises(MergeError, match="is merged"):
        model.load_adapter(tmp_path / "fits", "default")


def test_d11_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    base = tiny_llama(hidden_size=64)
    before = bytes_of(base)
    with pytest.raises(AdapterError, match="does not fit this LlamaForCausalLM"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same(bytes_of(base), before)
    with pytest.raises(ConfigError, match="key_mapping is not supported"):
        PeftModel.from_pretrained(base, tmp_path, key_mapping={"a": "b"})
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload is not supported"):
        PeftModel.from_pretrained(base, tmp_path, ephemeral_gpu_offload=True)


@pytest.mark.parametrize("autocast", [True, False])
def test_d15_the_type_of_a_loaded_adapter_is_chosen(autocast: bool, tmp_path: Path) -> None:
    def narrow() -> nn.Module:
        return tiny_llama().to(torch.bfloat16)

    wrapped(narrow).save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(narrow(), tmp_path, autocast_adapter_dtype=autocast)
    model = PeftModel.from_pretrained(narrow(), tmp_path, autocast_adapter_dtype=autocast)
    kinds = {one.dtype for name, one in theirs.named_parameters() if "lora_" in name}
    assert {one.dtype for name, one in model.named_parameters() if ".lora." in name} == kinds
    model.load_adapter(tmp_path, "b", autocast_adapter_dtype=autocast)
    assert {one.dtype for name, one in model.named_parameters() if ".lora." in name} == kinds


def test_a_trainable_one_keeps_the_mode_and_learns(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama().train(), tmp_path, is_trainable=True)
    assert model.training
    assert all(one.requires_grad for name, one in model.named_parameters() if ".lora." in name)
    assert model.peft_config["default"].inference_mode is False
    assert not PeftModel.from_pretrained(tiny_llama().train(), tmp_path).training
    assert type(PeftModelForCausalLM.from_pretrained(tiny_llama(), tmp_path)) is PeftModelForCausalLM


def test_what_was_loaded_is_saved_again_the_same(tmp_path: Path) -> None:
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, init_lora_weights="orthogonal", revision="v1"))
        theirs.save_pretrained(tmp_path / "a")
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").save_pretrained(tmp_path / "b")
    said = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (said["init_lora_weights"], said["revision"]) == ("orthogonal", "v1")
    assert said["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert same(left, right)


def test_options_of_starts_that_rewrite_the_base_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion is for starts"):
        wrapped().save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    shutil.rmtree(tmp_path)
    with pytest.raises(AdapterError, match="there is no adapter at"):
        get_peft_model(tiny_llama(), LoraConfig(r=2)).load_adapter(tmp_path, "x")


@pytest.mark.parametrize("name", [".", "..", "../x", "/tmp/evil", "\0"])
def test_no_name_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    model = wrapped()
    model.add_adapter(name, config(target_modules=["v_proj"]))
    place = tmp_path / "inside" / "here"
    model.save_pretrained(place)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inside"]
    assert sorted(entry.name for entry in (tmp_path / "inside").iterdir()) == ["here"]
    assert PeftConfig.from_pretrained(place).target_modules != {"v_proj"}
    other = next(entry for entry in place.iterdir() if entry.is_dir())
    assert "v_proj" in PeftConfig.from_pretrained(other).target_modules


def test_a_name_that_exists_is_read_from_its_own_subdirectory(tmp_path: Path) -> None:
    """Trainer's load_best_model_at_end asks for the directory, whose root holds another adapter of the same shape."""
    model = wrapped()
    model.add_adapter("b", config())
    fill(model, seed=3)
    model.set_adapter("b")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fill(model, seed=4)
    model.load_adapter(tmp_path, "b")
    assert torch.equal(logits(model), expected)


def test_odd_places_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dir" / "adapter_config.json").mkdir(parents=True)
    for place in (tmp_path / "file" / "below", tmp_path / "loop", tmp_path / ("n" * 300), tmp_path / "dir"):
        with pytest.raises(AdapterError):
            wrapped().save_pretrained(place)


def test_a_state_dict_with_nan_is_refused() -> None:
    model = wrapped()
    state = {key: one.clone() for key, one in get_peft_model_state_dict(model).items()}
    next(iter(state.values()))[0] = torch.nan
    with pytest.raises(AdapterError, match="has values that are NaN or infinite"):
        set_peft_model_state_dict(model, state)


def test_a_state_dict_of_tied_weights_is_pefts(tmp_path: Path) -> None:
    made = get_peft_model(
        tiny_llama(tie_word_embeddings=True),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    )
    keys = set(get_peft_model_state_dict(made))
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} < keys
    set_peft_model_state_dict(made, get_peft_model_state_dict(made))
