"""Merging adapters into a base and saving the model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixtures import mixture
from tiny import file_size_limit, fill, tiny_llama, tiny_model_dir, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sideroad.adapter import Adapter, BaseRecord
from sideroad.attaching import attach
from sideroad.base import BaseConfig
from sideroad.compose import merge as merge_file
from sideroad.compose.merge import merge
from sideroad.config import AdapterConfig, DoraMethod, LoraMethod
from sideroad.errors import AdapterError, MergeError
from sideroad.tensor_files import read_header


def made(folder: Path, name: str, targets: str | tuple[str, ...] = "all-linear", **changes: object) -> Path:
    model = tiny_llama()
    handle = attach(model, AdapterConfig(targets=targets, method=LoraMethod(rank=3, alpha=6)), "x", seed=len(name))
    draw = torch.Generator().manual_seed(len(name))
    for parameter in handle.parameters("x").values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    replace(handle.adapter("x"), **changes).save(folder / name)
    return folder / name


def made_dora(folder: Path, name: str, targets: str | tuple[str, ...] = "all-linear") -> Path:
    handle = attach(tiny_llama(), AdapterConfig(targets=targets, method=DoraMethod(rank=3, alpha=6)), "x", seed=1)
    draw = torch.Generator().manual_seed(len(name))
    for path, parameter in handle.parameters("x").items():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data = parameter.data * (1 + 0.2 * noise) if path.endswith("magnitude") else noise * 0.1
    handle.adapter("x").save(folder / name)
    return folder / name


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(30).reshape(2, 15)).logits
    return found


def with_adapters(base: Path, weights: dict[Path, float]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for path in weights:
        handle = attach(model, Adapter.load(path), path.name)
    handle.activate({path.name: weight for path, weight in weights.items()})
    return logits(model)


def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model


def test_merged_equals_attached(tmp_path: Path, shared_model_dir: Path) -> None:
    adapter = made(tmp_path, "one", manifest={"prompt": {"system": "s"}})
    report = merge([adapter], tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)))
    expected = with_adapters(shared_model_dir, {adapter: 1.0})
    assert (expected - logits(load(shared_model_dir))).abs().max() > 1e-2
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    assert (report.dtype, report.modules, report.untied) == ("float32", 14, ())
    assert report.rounding is not None
    assert report.rounding < 1e-5
    assert set(report.files) == set(os.listdir(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([70]) == AutoTokenizer.from_pretrained(
        shared_model_dir
    ).decode([70])


def test_provenance_is_recorded(tmp_path: Path, shared_model_dir: Path) -> None:
    adapter = made(tmp_path, "one", manifest={"prompt": {"system": "s"}})
    report = merge([adapter], tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)))
    record = json.loads((tmp_path / "out/sideroad.json").read_text())
    assert record["prompt"] == {"system": "s"}
    assert record["merged"]["base"]["sha256"] == report.base.sha256
    assert record["merged"]["adapters"][0]["name"] == "one"
    assert record["merged"]["adapters"][0]["weight"] == 1.0
    assert str(tmp_path) not in json.dumps(record["merged"]["adapters"])
    card = (tmp_path / "out/README.md").read_text()
    assert report.base.sha256 in card
    assert "- one, weight 1, 14 layers" in card
    assert json.dumps(report.to_json())
    assert any("does not say which base" in note for note in report.notes)


def test_two_adapters_with_weights(tmp_path: Path, shared_model_dir: Path) -> None:
    weights = {made(tmp_path, "first"): 0.5, made(tmp_path, "second", ("q_proj", "up_proj")): -2.0}
    merge(weights, tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)))
    expected = with_adapters(shared_model_dir, weights)
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_is_the_exact_sum_rounded_once(tmp_path: Path, shared_model_dir: Path, dtype: str) -> None:
    adapter = made(tmp_path, "one", ("q_proj",))
    report = merge([adapter], tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)), dtype=dtype)  # type: ignore[arg-type]
    target = getattr(torch, dtype)
    assert {entry.dtype for entry in read_header(tmp_path / "out/model.safetensors").values()} == {target}
    path = "model.layers.0.self_attn.q_proj"
    weight = load(shared_model_dir).get_submodule(path).weight
    exact = Adapter.load(adapter).lower(path).apply_to(weight.detach())
    assert torch.equal(load(tmp_path / "out", target).get_submodule(path).weight, exact.to(target))
    assert report.rounding is not None
    assert 1e-5 < report.rounding < 0.1


def test_auto_keeps_the_base_dtype(tmp_path: Path) -> None:
    path = tmp_path / "base"
    tiny_llama().bfloat16().save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_dir(tmp_path)).save_pretrained(path)
    report = merge([made(tmp_path, "one")], tmp_path / "out", base=BaseConfig(model=str(path)))
    assert report.dtype == "bfloat16"
    full = merge([tmp_path / "one"], tmp_path / "full", base=BaseConfig(model=str(path)), dtype="float32")
    assert full.rounding is not None
    assert report.rounding is not None
    assert full.rounding < 1e-5 < report.rounding


def test_a_tied_head_is_untied_and_said_so(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path, tie_word_embeddings=True)
    model = load(base)
    handle = attach(model, AdapterConfig(targets=("lm_head",), method=LoraMethod(rank=2)), "x", seed=0)
    draw = torch.Generator().manual_seed(0)
    for parameter in handle.parameters("x").values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    handle.adapter("x").save(tmp_path / "head")
    expected = logits(model)
    report = merge([tmp_path / "head"], tmp_path / "out", base=BaseConfig(model=str(base)))
    assert report.untied == ("lm_head",)
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, load(base).get_input_embeddings().weight)  # type: ignore[operator]


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path, tie_word_embeddings=True)
    adapter = made(tmp_path, "one")
    merge([adapter], tmp_path / "out", base=BaseConfig(model=str(base)))
    assert "lm_head.weight" not in read_header(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), with_adapters(base, {adapter: 1.0}), rtol=1e-5, atol=1e-5
    )


def test_the_base_is_the_one_the_adapter_names(tmp_path: Path, shared_model_dir: Path) -> None:
    adapter = made(tmp_path, "one", base=BaseRecord(str(shared_model_dir)))
    assert merge([adapter], tmp_path / "out").base.name == shared_model_dir.name
    other = made(tmp_path, "other", base=BaseRecord("elsewhere"))
    with pytest.raises(MergeError, match="name different bases; give the base to merge into"):
        merge([adapter, other], tmp_path / "out2")
    with pytest.raises(MergeError, match="does not say which base it was made for; give the base"):
        merge([made(tmp_path, "bare")], tmp_path / "out2")


def test_another_base_is_refused(tmp_path: Path, shared_model_dir: Path) -> None:
    adapter = made(tmp_path, "one", base=BaseRecord("tiny", None, "f" * 64))
    base = BaseConfig(model=str(shared_model_dir))
    with pytest.raises(MergeError, match=r"was made for tiny \(weights ffffffffffff…\), but the base is tiny-llama"):
        merge([adapter], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    report = merge([adapter], tmp_path / "out", base=base, any_base=True)
    assert any("was made for tiny" in note for note in report.notes)


def test_what_does_not_fit_float16_is_refused(tmp_path: Path, shared_model_dir: Path) -> None:
    adapter = made(tmp_path, "one", ("q_proj",))
    with pytest.raises(MergeError, match=r"q_proj\.weight does not fit float16: it would hold infinities"):
        merge({adapter: 1e7}, tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)), dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("adapters", "words"), [([], "no adapter to merge"), (["a", "./a"], "given twice: a")])
def test_wrong_lists_of_adapters(tmp_path: Path, adapters: list[str], words: str) -> None:
    with pytest.raises(MergeError, match=words):
        merge(adapters, tmp_path / "out")
    with pytest.raises(MergeError, match='adapters is one path, "a"'):
        merge("a", tmp_path / "out")


def test_an_occupied_place_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="is not replaced"):
        merge(["no-such-adapter"], tmp_path / "out")


def test_only_merged_models_are_replaced(tmp_path: Path, shared_model_dir: Path) -> None:
    adapter, base = made(tmp_path, "one"), BaseConfig(model=str(shared_model_dir))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("x")
    with pytest.raises(AdapterError, match="is not replaced: it holds something that no merge wrote"):
        merge([adapter], tmp_path / "out", base=base)
    merge([adapter], tmp_path / "new", base=base)
    merge({adapter: 0.5}, tmp_path / "new", base=base)
    assert json.loads((tmp_path / "new/sideroad.json").read_text())["merged"]["adapters"][0]["weight"] == 0.5


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_full_disk_leaves_the_old_model(tmp_path: Path, shared_model_dir: Path, size: int) -> None:
    adapter, base = made(tmp_path, "one"), BaseConfig(model=str(shared_model_dir))
    merge([adapter], tmp_path / "out", base=base)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with file_size_limit(size), pytest.raises(AdapterError, match="out cannot be written: File too large"):
        merge({adapter: 2.0}, tmp_path / "out", base=base)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_torn_write_leaves_the_old_model(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = made(tmp_path, "one"), BaseConfig(model=str(shared_model_dir))
    merge([adapter], tmp_path / "out", base=base)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(merge_file, "same_bits", lambda left, right: False)
    with pytest.raises(MergeError, match="reads back differently"):
        merge({adapter: 2.0}, tmp_path / "out", base=base)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_merged_and_saved(name: str, tmp_path: Path) -> None:
    base = mixture(name)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    handle = attach(base, AdapterConfig(method=LoraMethod(rank=2)))
    fill(handle, size=0.2)
    handle.adapter("default").save(tmp_path / "one")
    report = merge([tmp_path / "one"], tmp_path / "out", base=BaseConfig(model=str(tmp_path / "base")), dtype="float32")
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(base), rtol=1e-4, atol=1e-4)
    assert report.modules == 2 * (4 + 2)
    assert report.rounding is not None
    assert report.rounding < 1e-5


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("dora",), (1.0,)),
        (("dora",), (0.7,)),
        (("dora", "plain"), (1.0, 1.0)),
        (("plain", "dora"), (-0.5, 0.6)),
    ],
)
def test_magnitudes_are_merged_as_the_handle_merges_them(
    names: tuple[str, ...], weights: tuple[float, ...], tmp_path: Path, shared_model_dir: Path
) -> None:
    make = {"dora": made_dora, "plain": made}
    adapters = {make[name](tmp_path, name): weight for name, weight in zip(names, weights, strict=True)}
    report = merge(adapters, tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)))
    model = load(shared_model_dir)
    for path in adapters:
        handle = attach(model, Adapter.load(path), path.name)
    handle.merge({path.name: weight for path, weight in adapters.items()})
    expected = handle.merge_and_unload().state_dict()
    found = load(tmp_path / "out").state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    assert (report.dtype, report.modules) == ("float32", 14)
    assert report.rounding is not None
    assert report.rounding < 1e-5


def test_the_rounding_of_a_magnitude_is_measured_on_the_dense_change(tmp_path: Path, shared_model_dir: Path) -> None:
    adapters = {made_dora(tmp_path, "dora", ("q_proj",)): 0.5, made(tmp_path, "one", ("q_proj",)): 2.0}
    report = merge(adapters, tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)), dtype="bfloat16")
    model, shares = load(shared_model_dir, torch.float64), []
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for path in adapters:
        handle = attach(model, Adapter.load(path), path.name)
    handle.merge({path.name: weight for path, weight in adapters.items()})
    for path in handle.paths("dora"):
        exact = model.get_submodule(path).weight.detach()
        lost = (exact.bfloat16().double() - exact).norm()
        shares.append(float(lost / (exact - before[f"{path}.weight"]).norm()))
    assert report.rounding == pytest.approx(max(shares), rel=1e-3)


def test_a_magnitude_that_is_not_trained_yet_changes_nothing(tmp_path: Path, shared_model_dir: Path) -> None:
    model = load(shared_model_dir)
    attach(model, AdapterConfig(method=DoraMethod(rank=2)), seed=0).adapter("default").save(tmp_path / "fresh")
    report = merge([tmp_path / "fresh"], tmp_path / "out", base=BaseConfig(model=str(shared_model_dir)))
    assert report.rounding is None
    base = load(shared_model_dir).state_dict()
    assert all(torch.equal(one, base[name]) for name, one in load(tmp_path / "out").state_dict().items())
