"""Adapters of fused experts beside PEFT's: files both ways, forward and gradients on the same tensors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, IDS, logits, mixture
from tiny import fill
from torch import nn

from sideroad import peft as door
from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError
from sideroad.tensor_files import read_tensors

peft = pytest.importorskip("peft")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FIELDS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj"], "target_parameters": BOTH},
    "experts alone": {"target_modules": [], "target_parameters": BOTH},
    "one": {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.down_proj"]},
    "bare names": {"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]},
    "one block": {"target_modules": [], "target_parameters": [f"model.layers.1.mlp.{name}" for name in BOTH]},
    "patterns": {
        "target_modules": ["q_proj"], "target_parameters": BOTH, "rank_pattern": {"gate_up_proj": 3},
        "alpha_pattern": {"experts.down_proj": 5}, "use_rslora": True,
    },
    "limited": {"target_modules": ["q_proj"], "target_parameters": BOTH, "layers_to_transform": [1]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs_of(name: str, fields: dict[str, Any]) -> Any:
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **fields})
    model = peft.get_peft_model(mixture(name), config)
    torch.manual_seed(1)
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            nn.init.normal_(parameter.data, std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fields", FIELDS)
def test_theirs_act_here_as_there_and_come_back_the_same(name: str, fields: str, tmp_path: Path) -> None:
    theirs = theirs_of(name, FIELDS[fields])
    theirs.save_pretrained(tmp_path / "theirs")
    value = Adapter.load(tmp_path / "theirs")
    mine = mixture(name)
    base = logits(mine)
    handle = attach(mine, value)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(mine), base, atol=1e-2)
    for step, again in enumerate((value, handle.adapter("default"))):
        place = tmp_path / str(step)
        again.save(place)
        back = peft.PeftModel.from_pretrained(mixture(name), place).eval()
        torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-5, atol=1e-5)
        expected = read_tensors(tmp_path / "theirs" / "adapter_model.safetensors")
        found = read_tensors(place / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"targets": ("gate_up_proj",)},
        {"targets": ("q_proj", "gate_up_proj", "re:.*experts[.]down_proj"), "layers": "1"},
        {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"*.0.*.down_proj": 3}},
        {"exclude": ("*.0.mlp.experts.*",)},
    ],
    ids=str,
)
def test_ours_act_there_as_here(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    mine = mixture(name)
    handle = attach(mine, AdapterConfig(**{"method": LoraMethod(rank=2, alpha=4), **fields}))
    fill(handle, size=0.2)
    handle.adapter("default").save(tmp_path / "mine")
    theirs = peft.PeftModel.from_pretrained(mixture(name), tmp_path / "mine").eval()
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=1e-5, atol=1e-5)
    for exact in (True, False):
        if not exact:
            (tmp_path / "mine" / "sideroad.json").unlink(missing_ok=True)
        value, plain = Adapter.load(tmp_path / "mine"), mixture(name)
        assert value.same_weights(handle.adapter("default"))
        attach(plain, value)
        assert torch.equal(logits(plain), logits(mine))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_theirs(name: str) -> None:
    theirs = theirs_of(name, FIELDS["both"])
    ours = door.get_peft_model(mixture(name), door.LoraConfig(r=2, lora_alpha=4, **FIELDS["both"]))
    door.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    for model in (ours, theirs):
        model.train()
        model(IDS).logits.square().mean().backward()
    handle = ours.base_model.handle
    gradients = {path: one.grad for path, one in handle.parameters("default").items()}
    found = 0
    for path, parameter in theirs.named_parameters():
        if "lora_" not in path:
            assert parameter.grad is None
            continue
        leaf = "A" if "lora_A" in path else "B"
        owner = path.removeprefix("base_model.model.").partition(".lora_")[0]
        if "experts" in owner:
            inner = owner.endswith(".base_layer")
            owner = owner.removesuffix(".base_layer") + (".gate_up_proj" if inner else ".down_proj")
        own = gradients[f"{owner}.{leaf}"]
        if "experts" in owner and leaf == "B":
            own = own.reshape(4, -1, 2).permute(1, 2, 0).reshape(-1, 8)
        scale = parameter.grad.abs().max()
        assert ((own - parameter.grad).abs().max() / scale).item() <= 1e-5, path
        found += 1
    assert found == len(gradients) == 2 * 2 * 3


def test_a_fresh_pair_is_drawn_as_theirs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(mixture("mixtral"), peft.LoraConfig(r=4, target_modules=[], target_parameters=BOTH))
    mine = attach(mixture("mixtral"), AdapterConfig(targets=("gate_up_proj", "down_proj"), method=LoraMethod(rank=4)))
    for path, parameter in theirs.named_parameters():
        if "layers.0" in path and "lora_A" in path:
            name = "gate_up_proj" if ".base_layer." in path else "down_proj"
            own = mine.parameters("default")[f"model.layers.0.mlp.experts.{name}.A"]
            assert own.shape == parameter.shape
            assert own.abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.1)


def test_the_door_acts_as_peft_does(tmp_path: Path) -> None:
    for fields in FIELDS.values():
        theirs = theirs_of("qwen2_moe", fields)
        ours = door.get_peft_model(mixture("qwen2_moe"), door.LoraConfig(r=2, lora_alpha=4, **fields))
        state = peft.get_peft_model_state_dict(theirs)
        assert {key: one.shape for key, one in door.get_peft_model_state_dict(ours).items()} == {
            key: one.shape for key, one in state.items()
        }
        door.set_peft_model_state_dict(ours, state)
        torch.testing.assert_close(logits(ours.eval()), logits(theirs), rtol=1e-5, atol=1e-5)
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        gathered = door.get_peft_model_state_dict(ours, ours.state_dict())
        assert all(torch.equal(gathered[key], one) for key, one in state.items())
        ours.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(mixture("qwen2_moe"), tmp_path / "ours").eval()
        torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    words = [one.module_type for one in door.get_layer_status(ours) if "experts" in one.name]
    assert words == ["lora.ParamWrapper"] * 4


def test_the_door_says_what_it_leaves_out_and_what_means_nothing() -> None:
    with pytest.warns(UserWarning, match=r"fused experts of MixtralForCausalLM \(experts.gate_up_proj, ex"):
        door.get_peft_model(mixture("mixtral"), door.LoraConfig(r=2, target_modules="all-linear"))
    fields: dict[str, Any] = {"r": 2, "target_parameters": ["experts.gate_proj"]}
    with pytest.raises(AdapterError, match=r'"experts.gate_proj" means no stacked weight of experts'):
        door.get_peft_model(mixture("mixtral"), door.LoraConfig(**fields))


def test_a_parameter_of_an_ordinary_layer_is_that_layer(tmp_path: Path) -> None:
    theirs = theirs_of("mixtral", {"target_modules": [], "target_parameters": ["q_proj.weight", "experts.down_proj"]})
    theirs.save_pretrained(tmp_path / "theirs")
    mine = mixture("mixtral")
    attach(mine, Adapter.load(tmp_path / "theirs"))
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-5, atol=1e-5)


def test_an_adapted_router_is_refused_by_its_name(tmp_path: Path) -> None:
    theirs_of("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="is a MixtralTopKRouter, which cannot be adapted"):
        attach(mixture("mixtral"), Adapter.load(tmp_path / "a"))


def test_a_file_whose_configuration_was_changed_is_refused(tmp_path: Path) -> None:
    theirs_of("mixtral", FIELDS["experts alone"]).save_pretrained(tmp_path / "a")
    said = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for change, words in (
        ({"target_parameters": None}, "target_parameters name none"),
        ({"target_parameters": BOTH[:1]}, "has 2 pairs on parameters, and target_parameters name gate_up_proj there"),
        ({"target_parameters": [*BOTH, "experts.up_proj"]}, "list exactly those that the file has a pair for"),
        ({"r": 3}, "not made of pairs of rank 3"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters"),
    ):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(AdapterError, match=words):
            Adapter.load(tmp_path / "a")
    # a rank that divides too, but is not the one
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**said, "r": 4}))
    with pytest.raises(AdapterError, match=r"for rank 4"):
        attach(mixture("mixtral"), Adapter.load(tmp_path / "a"))
