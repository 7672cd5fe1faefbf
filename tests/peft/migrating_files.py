"""Rows of the migration guide about state dicts, files and names: M100 to M115."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path

import peft
import pytest
import torch
from migrating import agree, own, three, two
from pairs import config, fill, logits, quiet, relative
from safetensors.torch import load_file
from tiny import IDS, tiny_llama
from transformers import LlamaForCausalLM

from sideroad import Adapter, attach, attached, errors
from sideroad import peft as door
from sideroad.peft import LoraModel

FILE = "adapter_model.safetensors"


def m100_state(folder: Path) -> None:
    ours, theirs, handle = three()
    mine, expected = door.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[key], expected[key]) for key in expected)
    pointers = {one.data_ptr() for one in ours.parameters()}
    assert {one.data_ptr() for one in mine.values()} <= pointers
    weights = handle.adapter("default").weights
    assert torch.equal(weights["model.layers.0.self_attn.q_proj"]["A"], next(iter(mine.values())))


def m101_set_state(folder: Path) -> None:
    ours, theirs, handle = three()
    fresh = door.get_peft_model(tiny_llama(), config())
    state = peft.get_peft_model_state_dict(theirs)
    assert door.set_peft_model_state_dict(fresh, state).unexpected_keys == []
    agree(fresh, theirs, handle)
    before = logits(fresh)
    key = next(iter(state))
    wrong = {**state, "base_model.model.nope.lora_A.weight": torch.ones(4, 4)}
    del wrong[key]
    with pytest.raises(errors.AdapterError):
        door.set_peft_model_state_dict(fresh, wrong)
    value = handle.adapter("default")
    with pytest.raises(errors.AdapterError):
        handle.load("default", Adapter(value.config, {}))
    assert torch.equal(logits(fresh), before)
    with pytest.raises(errors.ConfigError, match="ignore_mismatched_sizes"):
        door.set_peft_model_state_dict(fresh, state, ignore_mismatched_sizes=True)
    assert ours is not fresh


def m102_base_state(folder: Path) -> None:
    ours, theirs, handle = three()
    plain = tiny_llama()
    found = door.get_base_model_state_dict(ours)
    assert found.keys() == peft.get_base_model_state_dict(theirs).keys() == plain.state_dict().keys()
    assert {name for name in handle.model.state_dict() if ".lora." not in name} == set(found)
    other = tiny_llama(seed=5).state_dict()
    door.set_base_model_state_dict(ours, other)
    peft.set_base_model_state_dict(theirs, other)
    handle.model.load_state_dict(other, strict=False)
    agree(ours, theirs, handle)


def m103_names(folder: Path) -> None:
    ours, theirs, handle = two()
    names = {
        name.replace(".lora_A.default.weight", ".lora.default.A").replace(".lora_B.default.weight", ".lora.default.B")
        .replace(".lora_A.b.weight", ".lora.b.A").replace(".lora_B.b.weight", ".lora.b.B")
        for name, _ in theirs.named_parameters() if "lora_" in name
    }  # fmt: skip
    assert {name for name, _ in ours.named_parameters() if ".lora." in name} == names
    assert {name for name, _ in ours.named_parameters() if "lora" in name} == names
    assert not [name for name, _ in ours.named_parameters() if "lora_" in name]
    assert {f"base_model.model.{n}" for n, _ in handle.model.named_parameters() if ".lora." in n} == names
    ours.save_pretrained(folder)
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in load_file(folder / FILE))


def m104_reaching_in(folder: Path) -> None:
    ours, theirs, handle = three()
    layer, other = (model.base_model.model.model.layers[0].self_attn.q_proj for model in (ours, theirs))
    assert torch.equal(layer.lora.default.A, other.lora_A["default"].weight)
    assert torch.equal(handle.parameters("default")["model.layers.0.self_attn.q_proj.A"], layer.lora.default.A)
    assert not any(hasattr(layer, name) for name in ("lora_A", "base_layer", "scaling"))
    assert torch.equal(layer.weight, other.base_layer.weight)


def m105_base_names(folder: Path) -> None:
    ours, theirs, handle = three()
    path = "model.layers.0.self_attn.q_proj"
    assert f"base_model.model.{path}.base_layer.weight" in theirs.state_dict()
    assert f"base_model.model.{path}.weight" in ours.state_dict()
    assert f"{path}.weight" in handle.model.state_dict()


def m106_save(folder: Path) -> None:
    ours, theirs, handle = two()
    ours.save_pretrained(folder / "ours")
    with quiet():
        theirs.save_pretrained(folder / "theirs")
    for place in ("", "b"):
        mine, other = (load_file(folder / name / place / FILE) for name in ("ours", "theirs"))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in other)
        handle.adapter(place or "default").save(folder / "own" / place)
        assert load_file(folder / "own" / place / FILE).keys() == other.keys()
    assert len((folder / "ours/adapter_config.json").read_text()) < len(
        (folder / "theirs/adapter_config.json").read_text()
    )


def m107_selected(folder: Path) -> None:
    ours, theirs, _ = two()
    for name, model in (("ours", ours), ("theirs", theirs)):
        with quiet():
            model.save_pretrained(folder / name, selected_adapters=["b"])
        assert {one.name for one in (folder / name).iterdir()} == {"README.md", "b"}


def m108_pickles(folder: Path) -> None:
    ours, theirs, _ = three()
    with pytest.raises(errors.ConfigError, match="pickle"):
        ours.save_pretrained(folder / "a", safe_serialization=False)
    with quiet():
        theirs.save_pretrained(folder / "b", safe_serialization=False)
    for load in (
        lambda: Adapter.load(folder / "b"),
        lambda: door.PeftModel.from_pretrained(tiny_llama(), folder / "b"),
    ):
        with pytest.raises(errors.AdapterError, match=r"torch\.load"):
            load()


def m109_grown(folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "base")
    rows: dict[str, int] = {}
    for name, library in (("ours", door), ("theirs", peft)):
        base = LlamaForCausalLM.from_pretrained(folder / "base").eval()
        base.resize_token_embeddings(262, mean_resizing=False)
        with quiet():
            model = library.get_peft_model(base, library.LoraConfig(target_modules=["q_proj"]))
            model.save_pretrained(folder / name, save_embedding_layers="auto")
        saved = load_file(folder / name / FILE)
        rows[name] = sum(one.shape[0] for key, one in saved.items() if "embed" in key or "lm_head" in key)
    assert rows == {"ours": 2 * 3, "theirs": 2 * 262}
    with pytest.raises(errors.ConfigError, match="save_embedding_layers"):
        three()[0].save_pretrained(folder / "x", save_embedding_layers=True)


def m110_conversion(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="path_initial_model_for_weight_conversion"):
        three()[0].save_pretrained(folder, path_initial_model_for_weight_conversion="x")


def m111_base_with_adapters(folder: Path) -> None:
    ours, _, handle = three()
    for base in (ours.get_base_model(), handle.model):
        with pytest.raises(errors.AdapterError, match=r"(?s)adapter.*merged.*base"):
            base.save_pretrained(folder)  # type: ignore[operator]
    assert not list(folder.iterdir())


def m112_card(folder: Path) -> None:
    ours, theirs, handle = three()
    for name, model in (("ours", ours), ("theirs", theirs)):
        (folder / name).mkdir()
        model.create_or_update_model_card(str(folder / name))
        text = (folder / name / "README.md").read_text()
        assert "library_name: peft" in text
        assert "- lora" in text
    handle.adapter("default").save(folder / "own", card="# mine\n")
    assert (folder / "own/README.md").read_text() == "# mine\n"


def m113_isinstance(folder: Path) -> None:
    ours, theirs, handle = three()
    assert isinstance(ours, peft.PeftModel)
    assert isinstance(ours, peft.PeftModelForCausalLM)
    assert isinstance(ours, door.PeftModel)
    assert type(ours).__module__.startswith("sideroad.peft")
    assert not isinstance(handle.model, peft.PeftModel)
    assert isinstance(theirs, peft.PeftModel)


def m114_submodules(folder: Path) -> None:
    ours, _, handle = three()
    assert not [one for one in ours.modules() if isinstance(one, peft.tuners.lora.LoraLayer)]
    for name in ("tuners.lora", "utils"):
        importlib.import_module(f"peft.{name}")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"sideroad.peft.{name}")
    assert attached(handle.model) is handle
    assert isinstance(ours.base_model, LoraModel)


def m115_copies(folder: Path) -> None:
    ours, _, handle = three()
    says = logits(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(handle.model)):
        assert relative(logits(again, IDS), says) <= 1e-6
        fill(again, seed=5)
    assert torch.equal(logits(ours), says)
    assert attach(copy.deepcopy(handle.model), own(), "b") is not handle
