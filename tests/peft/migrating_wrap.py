"""Rows of the migration guide about wrapping and loading: M50 to M66."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from migrating import agree, alike, own, three, trained, trained_by_peft, two
from pairs import QV, both, config, fill, logits, quiet, relative
from tiny import IDS, tiny_llama
from torch import nn

from sideroad import Adapter, attach, attached, errors
from sideroad import peft as door


def m50_wrap(folder: Path) -> None:
    ours, theirs, handle = alike()
    assert type(ours).__name__ == type(theirs).__name__
    layer, plain = (m.model.layers[0].self_attn.q_proj for m in (ours.get_base_model(), tiny_llama()))
    assert type(layer) is type(plain)
    assert torch.equal(layer.weight, plain.weight)
    assert type(handle.model) is type(tiny_llama())


def m51_narrow(folder: Path) -> None:
    for autocast, word in ((False, "base"), (True, "float32")):
        ours, theirs = both(lambda: tiny_llama().bfloat16(), autocast=autocast)
        handle = attach(tiny_llama().bfloat16(), own(dtype=word))
        kinds = {one.dtype for one in peft.get_peft_model_state_dict(theirs).values()}
        assert {one.dtype for one in door.get_peft_model_state_dict(ours).values()} == kinds
        assert {one.dtype for one in handle.parameters("default").values()} == kinds


def m52_twice(folder: Path) -> None:
    ours, theirs, handle = three()
    with pytest.raises(errors.AdapterError, match="has adapters already"):
        door.get_peft_model(ours, config())
    with quiet():
        peft.get_peft_model(theirs, peft.LoraConfig(**QV))
    assert attach(handle.model, own(), "b") is handle


def m53_load(folder: Path) -> None:
    ours = three()[0]
    ours.save_pretrained(folder / "a")
    with quiet():
        read = peft.PeftModel.from_pretrained(tiny_llama(), folder / "a")
    handle = attach(tiny_llama(), Adapter.load(folder / "a"))
    agree(door.PeftModel.from_pretrained(tiny_llama(), folder / "a"), read, handle)
    agree(ours, read)
    for load in (
        lambda: door.PeftModel.from_pretrained(tiny_llama(hidden_size=48), folder / "a"),
        lambda: attach(tiny_llama(hidden_size=48), Adapter.load(folder / "a")),
    ):
        with pytest.raises(errors.AdapterError, match=r"does not fit .*8 problems|needed|shape"):
            load()


def m54_trainable(folder: Path) -> None:
    three()[0].save_pretrained(folder)
    for flag in (True, False):
        ours = door.PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=flag)
        with quiet():
            theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=flag)
        handle = attach(tiny_llama(), Adapter.load(folder), trainable=flag)
        assert bool(trained(ours)) == bool(trained(handle.model)) == bool(trained_by_peft(theirs)) == flag


def m55_hub(folder: Path) -> None:
    made = three()[0]
    made.save_pretrained(folder)
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(folder)) as fetched:
        ours = door.PeftModel.from_pretrained(tiny_llama(), "org/name", revision="v1")
        assert door.LoraConfig.from_pretrained("org/name").r == made.peft_config["default"].r
    assert torch.equal(ours.eval()(IDS).logits, made.eval()(IDS).logits)
    assert fetched.call_args_list[0].kwargs["revision"] == "v1"
    assert not any(".bin" in pattern for pattern in fetched.call_args.kwargs["allow_patterns"])
    with pytest.raises(errors.AdapterError, match="hf download"):
        Adapter.load("org/name")


def m56_options_of_the_base(folder: Path) -> None:
    three()[0].save_pretrained(folder)
    with pytest.raises(errors.AdapterError, match="is a local directory and has none"):
        door.PeftModel.from_pretrained(tiny_llama(), folder, revision="main")
    for name in ("device_map", "torch_dtype"):
        with pytest.raises(TypeError, match=name):
            door.PeftModel.from_pretrained(tiny_llama(), folder, **{name: "auto"})


def m57_refused_options(folder: Path) -> None:
    three()[0].save_pretrained(folder)
    for name, value in (("key_mapping", {"a": "b"}), ("ephemeral_gpu_offload", True)):
        with pytest.raises(errors.ConfigError, match=name):
            door.PeftModel.from_pretrained(tiny_llama(), folder, **{name: value})


def m58_without_effect(folder: Path) -> None:
    ours, _, _ = three()
    ours.save_pretrained(folder)
    read = door.PeftModel.from_pretrained(tiny_llama(), folder, low_cpu_mem_usage=True, torch_device="cpu")
    assert torch.equal(logits(read), logits(ours))


def m59_load_adapter(folder: Path) -> None:
    source, _, _ = two()
    source.save_pretrained(folder)
    ours, theirs, handle = three()
    before = trained(ours)
    ours.load_adapter(folder / "b", "b")
    with quiet():
        theirs.load_adapter(folder / "b", "b")
    attach(handle.model, Adapter.load(folder / "b"), "b")
    assert trained(ours) == trained(handle.model) == before == {"default"}
    ours.set_adapter("b")
    theirs.set_adapter("b")
    handle.activate("b")
    agree(ours, theirs, handle)
    fill(ours, seed=8)
    ours.load_adapter(folder / "b", "b")
    agree(ours, theirs)


def m60_add_adapter(folder: Path) -> None:
    ours, theirs, handle = two()
    assert list(ours.peft_config) == list(theirs.peft_config) == list(handle.names) == ["default", "b"]
    agree(ours, theirs, handle)


def m61_inject(folder: Path) -> None:
    ours = door.inject_adapter_in_model(config(), tiny_llama())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**QV), tiny_llama())
    handle = attach(tiny_llama(), own())
    fill(ours)
    state = door.get_peft_model_state_dict(ours)
    with quiet():
        peft.set_peft_model_state_dict(theirs, state)
    injected = attached(ours)
    assert injected is not None
    handle.load("default", injected.adapter("default"))
    agree(ours, theirs, handle)


def m62_constructors(folder: Path) -> None:
    with quiet():
        theirs = peft.PeftModel(tiny_llama(), peft.LoraConfig(**QV))
    ours = door.PeftModel(tiny_llama(), config())
    assert (type(ours), ours.active_adapter) == (door.PeftModel, theirs.active_adapter)
    tuner = door.LoraModel(tiny_llama(), config(), "x")
    with quiet():
        assert tuner.active_adapters == peft.LoraModel(tiny_llama(), peft.LoraConfig(**QV), "x").active_adapters
    with pytest.raises(errors.ConfigError, match=r"is a builtins\.dict"):
        door.LoraModel(tiny_llama(), {"x": config()}, "x")  # type: ignore[arg-type]


def m63_automatic(folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "base")
    base = type(tiny_llama()).from_pretrained(folder / "base").eval()
    ours = door.get_peft_model(base, config())
    fill(ours)
    ours.save_pretrained(folder / "a")
    with quiet():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "a")
    agree(door.AutoPeftModelForCausalLM.from_pretrained(folder / "a"), theirs)
    agree(ours, theirs)


def m64_pefts_files(folder: Path) -> None:
    theirs = three()[1]
    with quiet():
        theirs.save_pretrained(folder)
    agree(door.PeftModel.from_pretrained(tiny_llama(), folder), theirs, attach(tiny_llama(), Adapter.load(folder)))


def m65_foreign_configurations(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="change the import of the configuration"):
        door.get_peft_model(tiny_llama(), peft.LoraConfig(**QV))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PeftConfig"):
        tiny_llama().add_adapter(config())


def m66_compiled(folder: Path) -> None:
    for put in (door.get_peft_model, attach):
        with pytest.raises(errors.AdapterError, match=r"attach first, then call torch\.compile"):
            put(torch.compile(tiny_llama(), backend="eager"), config() if put is not attach else own())
    ours = door.get_peft_model(nn.Sequential(nn.Linear(4, 4)), door.LoraConfig(r=2, target_modules=["0"]))
    ours.add_adapter("b", door.LoraConfig(r=2, target_modules=["0"]))
    fill(ours)
    compiled, x = torch.compile(ours, backend="eager"), torch.ones(1, 4)
    for name in ("default", "b"):
        ours.set_adapter(name)
        assert relative(compiled(x), ours(x)) <= 1e-6
    assert not torch.equal(compiled(x), ours.get_base_model()[0].bias + ours.get_base_model()[0].weight.sum(1))  # type: ignore[index]
