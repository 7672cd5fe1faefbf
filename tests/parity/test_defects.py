"""Defects of PEFT (D1 to D29 of the reference, by number and thread) as contracts of ours, seen from the outside.

Those of cost are in test_costs.py; those of features that are not here yet (combining, quantised bases, hot-swapping,
experts) have no test.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import config as door_config
from tiny import IDS, fill, recompute_activations, tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import sideroad
from sideroad import peft as door
from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, DoraMethod, LoraMethod
from sideroad.errors import AdapterError, MergeError, TargetError
from sideroad.tensor_files import read_tensors, same_bits

QV = AdapterConfig(targets=("q_proj", "v_proj"), method=LoraMethod(rank=4, alpha=8))


def filled(model: nn.Module, *names: str, config: AdapterConfig = QV) -> Attached:
    """Attach adapters that change what the model says."""
    for name in names:
        fill(attach(model, config, name, seed=1), name)
    handle = attached(model)
    assert handle is not None
    return handle


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(before: dict[str, Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return list(before) == list(after) and all(same_bits(before[name], after[name]) for name in before)


def test_d4_a_name_that_is_taken_is_refused_and_the_old_weights_stay() -> None:
    handle = filled(tiny_llama(), "a")
    old, before = handle.adapter("a"), logits(handle.model)
    for again in (QV, old):
        with pytest.raises(AdapterError, match='"a"'):
            attach(handle.model, again, "a")
    assert handle.adapter("a").same_weights(old)
    assert torch.equal(logits(handle.model), before)
    model = door.get_peft_model(tiny_llama(), door_config())
    with pytest.raises(AdapterError, match='"default"'):
        model.add_adapter("default", door_config())


def test_d5_an_exception_inside_a_mixed_batch_leaves_nothing_behind() -> None:
    handle = filled(tiny_llama(), "a", "b")
    fresh = logits(handle.model)
    hook = handle.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), handle.rows(["b"]):
        logits(handle.model)
    hook.remove()
    assert torch.equal(logits(handle.model), fresh)


def test_d7_peft2090_unknown_names_and_contradictions_raise() -> None:
    handle = filled(tiny_llama(), "good")
    with pytest.raises(AdapterError, match=r'(?s)"goood".*Did you mean "good"'), handle.rows(["goood"]):
        pass
    with handle.disabled(), pytest.raises(AdapterError, match="disabled"), handle.rows(["good"]):
        pass
    model = door.get_peft_model(tiny_llama(), door_config())
    with pytest.raises(AdapterError, match="defualt"):
        model(IDS, adapter_names=["defualt"])


def test_d8_trl6688_merging_and_back_leaves_every_bit_and_disabling_changes_nothing() -> None:
    handle = filled(tiny_llama().bfloat16(), "a")
    before, without = bits(handle.model), None
    with handle.disabled():
        without = logits(handle.model)
    for _ in range(50):
        handle.merge()
        handle.unmerge()
    assert unchanged(before, handle.model)
    handle.merge()
    merged = bits(handle.model)
    with handle.disabled():
        assert torch.equal(logits(handle.model), without)
    assert unchanged(merged, handle.model)
    assert handle.merged_names == ("a",)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_d10_peft2018_a_merge_on_one_of_two_tied_layers_leaves_the_other(target: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    plain = copy.deepcopy(model)
    handle = filled(model, "a", config=AdapterConfig(targets=(target, "q_proj"), method=LoraMethod(rank=4)))
    apart = logits(model)
    handle.merge()
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)
    other = "model.embed_tokens" if target == "lm_head" else "lm_head"
    assert torch.equal(model.get_submodule(other).weight, plain.get_submodule(other).weight)
    assert handle.untied
    handle.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_d11_peft2118_tensors_too_many_or_too_few_are_errors_that_name_them() -> None:
    value = filled(tiny_llama(), "a").adapter("a")
    first = value.paths[0]
    weights = dict(value.weights)
    weights[first.replace("q_proj", "q_prj")] = weights.pop(first)
    fields = {"config": value.config, "weights": weights}
    with pytest.raises(AdapterError, match=r'(?s)q_prj.*does not exist.*Did you mean.*q_proj.*has no tensors'):
        attach(tiny_llama(), Adapter(**fields))
    filled(tiny_llama(), "lora").adapter("lora")  # a name that PEFT warns about


def test_d12_peft1959_a_pattern_that_matches_nothing_is_an_error() -> None:
    for fields in ({"targets": ("q_proj", "nope")}, {"targets": "q_proj", "modules_to_save": ("nope",)}):
        with pytest.raises(TargetError, match='"nope" matches no'):
            attach(tiny_llama(), AdapterConfig(**fields))
        attach(tiny_llama(), AdapterConfig(**fields, allow_unmatched=True))


def test_d13_peft2158_a_string_is_one_name_in_one_language() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "q_proj": nn.Linear(8, 8), "xq": nn.Linear(8, 8)})
    table = {"q": ["q"], "q_proj": ["q_proj"], "q*": ["q", "q_proj"], "re:.*q": ["q", "xq"], "*q": ["q", "xq"]}
    for pattern, paths in table.items():
        assert list(sideroad.resolve(model, AdapterConfig(targets=pattern))) == paths, pattern
    model = door.get_peft_model(nn.Sequential(model["q"]), door.LoraConfig(r=1, target_modules="0"))
    first = next(name for name, one in model.named_parameters() if one.requires_grad)
    assert first.startswith("base_model.model.0.lora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_d15_peft2889_an_adapter_is_stored_in_the_type_that_was_said(dtype: torch.dtype, tmp_path: Path) -> None:
    said: Any = "float32" if dtype == torch.float32 else "base"
    handle = filled(tiny_llama().bfloat16(), "a", config=QV.model_copy(update={"dtype": said}))
    handle.adapter("a").save(tmp_path / "a")
    again = attach(tiny_llama().bfloat16(), Adapter.load(tmp_path / "a"))
    for parameters in (handle.parameters("a"), again.parameters("default")):
        assert {one.dtype for one in parameters.values()} == {dtype}


@pytest.mark.parametrize("face", ["core", "door"])
def test_d18_peft1374_loading_never_changes_anothers_requires_grad(face: str, tmp_path: Path) -> None:
    filled(tiny_llama(), "x").adapter("x").save(tmp_path / "x")
    model: Any = tiny_llama().eval()
    if face == "core":
        handle = filled(model, "first")
        attach(model, Adapter.load(tmp_path / "x"), "second")
        handle.activate("second")
    else:
        model = door.get_peft_model(model, door_config(), "first")
        model.load_adapter(tmp_path / "x", "second")
        loaded = attached(model.get_base_model())
        assert loaded is not None
        handle = loaded
    assert all(one.requires_grad for one in handle.parameters("first").values())
    assert not any(one.requires_grad for one in handle.parameters("second").values())


@pytest.mark.parametrize("training", [True, False])
def test_d19_peft3766_an_adapter_is_in_the_mode_of_its_model(training: bool) -> None:
    model = tiny_llama().train(training)
    handle = filled(model, "a", config=AdapterConfig(targets="q_proj", method=LoraMethod(dropout=0.5)))
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(logits(model), logits(model)) is not training
    handle.detach()
    assert {module.training for module in model.modules()} == {training}


def test_d20_peft1929_the_base_is_never_written_and_comes_back_whole() -> None:
    model = tiny_llama()
    before, says, flags = bits(model), logits(model), [one.requires_grad for one in model.parameters()]
    for init in ("kaiming", "gaussian", "random", "pissa", "pissa-fast", "olora"):
        config = QV.model_copy(update={"method": LoraMethod(rank=4, init=init)})
        handle = attach(model, config, init)
        now = model.state_dict()
        assert all(same_bits(now[name], tensor) for name, tensor in before.items())
    model(IDS).logits.sum().backward()
    handle.detach()
    assert unchanged(before, model)
    assert torch.equal(logits(model), says)
    assert [one.requires_grad for one in model.parameters()] == flags


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_d20_peft1929_a_start_from_the_weight_breaks_no_other_adapter(init: str, tmp_path: Path) -> None:
    handle = filled(tiny_llama(), "a")
    alone = logits(handle.model)
    config = QV.model_copy(update={"method": LoraMethod(rank=4, alpha=8, init=init)})
    attach(handle.model, config, "started", seed=2)
    assert torch.equal(logits(handle.model), alone)
    fill(handle, "started")
    handle.activate("started")
    says = logits(handle.model)
    handle.adapter("started").save(tmp_path / "started")
    # its file is for the published base, on which the other one is right too
    other = filled(tiny_llama(), "a")
    attach(other.model, Adapter.load(tmp_path / "started"), "started")
    assert torch.equal(logits(other.model), alone)
    other.activate("started")
    assert torch.equal(logits(other.model), says)
    for name, wanted in (("a", alone), ("started", says)):
        with other.merged(name):
            torch.testing.assert_close(logits(other.model), wanted, rtol=1e-4, atol=1e-5)


def test_d20_peft940_attaching_twice_gives_the_same_handle_and_wrapping_twice_is_refused() -> None:
    model = tiny_llama()
    assert attach(model, QV, "a") is attach(model, QV, "b")
    wrapped = door.get_peft_model(tiny_llama(), door_config())
    with pytest.raises(AdapterError):
        door.get_peft_model(wrapped, door_config())


def test_d21_peft453_empty_tensors_are_neither_written_nor_read(tmp_path: Path) -> None:
    value = filled(tiny_llama(), "a").adapter("a")
    value.save(tmp_path / "a")
    before = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    empty = {path: {part: one[:0] for part, one in parts.items()} for path, parts in value.weights.items()}
    with pytest.raises(AdapterError, match="is empty"):
        Adapter(config=value.config, weights=empty).save(tmp_path / "a")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == before
    with pytest.raises(AdapterError, match="no pair"):
        Adapter(config=value.config, weights={}).save(tmp_path / "b")


def test_d22_peft602_what_was_trained_is_what_is_saved_and_comes_back(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(**shape, num_hidden_layers=1, intermediate_size=16)).eval()

    rows = {"word_embeddings": (3, 5)}
    config = AdapterConfig(
        targets="query", modules_to_save=("classifier", "pooler"), trainable_tokens=rows, bias="all"
    )
    handle = filled(base(), "a", config=config)
    trained = [one for one in handle.model.parameters() if one.requires_grad]
    assert len(trained) == len(handle.parameters("a"))
    handle.adapter("a").save(tmp_path / "a")
    stored = read_tensors(tmp_path / "a/adapter_model.safetensors")
    assert len(stored) == len(trained)
    again = attach(base(), Adapter.load(tmp_path / "a"), "a")
    mine, theirs = handle.parameters("a"), again.parameters("a")
    assert mine.keys() == theirs.keys()
    assert all(same_bits(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(again.model), logits(handle.model))


def test_d23_peft2898_a_new_token_costs_one_row(tmp_path: Path) -> None:
    config = AdapterConfig(targets=(), trainable_tokens={"embed_tokens": (7,)})
    handle = filled(tiny_llama(tie_word_embeddings=True), "a", config=config)
    handle.adapter("a").save(tmp_path / "a")
    stored = read_tensors(tmp_path / "a/adapter_model.safetensors")
    assert [tuple(one.shape) for one in stored.values()] == [(1, 32)]
    assert handle.adapter("a").parameters == 32


@pytest.mark.parametrize("face", ["core", "door"])
def test_d25_peft3608_two_dora_adapters_on_one_layer_are_refused_so_merged_is_unmerged(face: str) -> None:
    dora = QV.model_copy(update={"method": DoraMethod(rank=4, alpha=8)})
    handle = filled(tiny_llama(), "a", "b", config=dora)
    filled(handle.model, "plain")
    fill(attach(handle.model, dora.model_copy(update={"targets": ("up_proj",)}), "elsewhere"), "elsewhere")
    if face == "door":
        model = door.get_peft_model(tiny_llama(), door_config(use_dora=True))
        model.add_adapter("b", door_config(use_dora=True))
        with pytest.raises(AdapterError, match="both DoRA adapters of model"):
            model.base_model.set_adapter(["default", "b"])
    for switch in (handle.activate, handle.merge, lambda names: handle.using(names).__enter__()):
        with pytest.raises(AdapterError, match=r'"a" and "b" are both DoRA adapters of model.*one magnitude'):
            switch(("a", "b"))
    for together in (("a",), ("b", "plain"), ("plain", "b", "elsewhere")):
        handle.activate(together)
        apart = logits(handle.model)
        with handle.merged():
            torch.testing.assert_close(logits(handle.model), apart, rtol=1e-5, atol=1e-5)


def test_d26_layers_that_share_a_weight_are_refused_and_a_layer_under_two_paths_is_right() -> None:
    x = torch.randn(2, 9)
    shared = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    shared[1].weight = shared[0].weight
    handle = filled(shared, "a", config=AdapterConfig(targets="0", method=LoraMethod(rank=2)))
    before = bits(shared)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(MergeError, match="replicated or shared layers"):
            merge()
    assert unchanged(before, shared)
    layer = nn.Linear(9, 9)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    handle = filled(twice, "a", config=AdapterConfig(targets="2", method=LoraMethod(rank=2)))
    apart = twice(x)
    handle.merge()
    torch.testing.assert_close(twice(x), apart)


@pytest.mark.parametrize("face", ["core", "door"])
def test_d27_peft1142_recomputed_activations_over_a_frozen_embedding_give_gradients(face: str) -> None:
    found = []
    for recompute in (False, True):
        model: Any = tiny_llama().train()
        if recompute:
            recompute_activations(model)
        if face == "core":
            handle = filled(model, "a")
        else:
            door.get_peft_model(model, door_config())
            made = attached(model)
            assert made is not None
            fill(made, "default")
            handle = made
        model(IDS).logits.square().mean().backward()
        found.append({name: one.grad for name, one in handle.parameters(handle.names[0]).items()})
    plain, again = found
    assert plain
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in again.values())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


def test_d29_there_is_one_merge() -> None:
    source = Path(sideroad.__file__).parent
    names = r"def (merge|unmerge|get_delta_weight|merged_parameters|restore)\b"
    found = {
        path.relative_to(source).as_posix(): len(re.findall(names, path.read_text()))
        for path in source.rglob("*.py") if re.search(names, path.read_text())
    }  # fmt: skip
    # the sums in merging.py; the verb of the handle, and a merge into files
    assert "merging.py" in found
    assert not [path for path in found if path.startswith(("methods/", "kinds/"))]
