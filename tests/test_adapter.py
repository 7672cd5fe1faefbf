"""The Adapter value and its directory."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sideroad import files, tensor_files
from sideroad.adapter import Adapter, BaseRecord
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError
from sideroad.tensor_files import write_tensors

CONFIG = AdapterConfig(targets=("q_proj", "v_proj"), method=LoraMethod(rank=2, alpha=3), alpha_pattern={"v_proj": 5})


def pair(rank: int = 2, out: int = 6, inner: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank * 100 + out)
    return {
        "A": torch.randn(rank, inner, generator=draw).to(dtype),
        "B": torch.randn(out, rank, generator=draw).to(dtype),
    }


def adapter(**changes: Any) -> Adapter:
    weights = {"m.layers.0.q_proj": pair(), "m.layers.0.v_proj": pair(out=3), "m.layers.1.q_proj": pair()}
    return replace(Adapter(CONFIG, weights, BaseRecord("tiny", "here", "ab", "MIT")), **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter().save(tmp_path / "a")
    return tmp_path / "a"


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(directory: Path, weights: Any, name: Any = lambda key: key) -> None:
    save_file({name(key): tensor for key, tensor in weights.items()}, directory / "adapter_model.safetensors")


def test_counts_paths_and_scales() -> None:
    value = adapter()
    assert value.paths == ("m.layers.0.q_proj", "m.layers.0.v_proj", "m.layers.1.q_proj")
    assert value.parameters == 2 * (8 + 12) + 8 + 6
    assert value.ranks == dict.fromkeys(value.paths, 2)
    assert (value.scale(value.paths[0]), value.scale(value.paths[1])) == (1.5, 2.5)


def test_lower_folds_the_scale_into_b() -> None:
    value = adapter(weights={"m.v_proj": pair(dtype=torch.bfloat16)})
    low, leaves = value.lower("m.v_proj"), value.weights["m.v_proj"]
    assert low.A.dtype == low.B.dtype == torch.float32
    assert torch.equal(low.dense(), (2.5 * leaves["B"].float()) @ leaves["A"].float())


def test_a_path_without_pair_is_named() -> None:
    with pytest.raises(AdapterError, match=r'no pair for "m\.layers\.0\.q_pro"\. Did you mean "m\.layers\.0\.q_proj"'):
        adapter().lower("m.layers.0.q_pro")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_everything_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    value = adapter(
        config=AdapterConfig(
            targets="all-linear",
            exclude=("lm_*",),
            layers="0-1",
            bias="all",
            method=LoraMethod(rank=2, init="gaussian"),
        ),
        weights={
            "m.layers.2.q": {**pair(dtype=dtype), "bias": torch.ones(6, dtype=dtype)},
            "m.layers.10.q": pair(rank=3, dtype=dtype),
            "m.norm": {"bias": torch.ones(5)},
        },
        foreign={"peft_version": "0.1", "use_new": None},
        manifest={"prompt": {"system": "é"}, "scores": [1.5, None]},
    )
    value = replace(value, config=value.config.model_copy(update={"rank_pattern": {"re:.*10.*": 3}, "dtype": "base"}))
    value.save(tmp_path / "a", card="# Card")
    again = Adapter.load(tmp_path / "a")
    assert again.same_weights(value)
    assert list(again.weights) == list(value.weights)
    assert (again.config, again.base, again.task_type) == (value.config, value.base, value.task_type)
    assert (again.foreign, again.manifest) == (value.foreign, value.manifest)
    assert (tmp_path / "a/README.md").read_text() == "# Card"


def test_the_files_are_minimal_and_reproducible(tmp_path: Path, saved: Path) -> None:
    adapter().save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors", "sideroad.json"):
        assert (saved / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (saved / "adapter_config.json").read_text()
    assert text.splitlines()[1] == '  "alpha_pattern": {'
    assert list(json.loads(text)) == sorted(json.loads(text))
    plain = adapter(base=BaseRecord("tiny"), config=CONFIG)
    plain.save(tmp_path / "plain")
    assert sorted(os.listdir(tmp_path / "plain")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_same_weights_sees_names_and_bits() -> None:
    value = adapter()
    assert value.same_weights(adapter())
    other = {**value.weights, "m.layers.1.q_proj": {**pair(), "A": pair()["A"].nextafter(torch.tensor(9.0))}}
    assert not value.same_weights(adapter(weights=other))
    assert not value.same_weights(adapter(weights={path: value.weights[path] for path in value.paths[:2]}))


def test_peft_changes_win_over_our_exact_configuration(tmp_path: Path) -> None:
    value = adapter(config=AdapterConfig(targets="*_proj", method=LoraMethod(rank=2, alpha=3)))
    value.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").config.targets == "*_proj"
    edit(tmp_path / "a", lora_alpha=7)
    assert Adapter.load(tmp_path / "a").config.method.alpha == 7
    edit(tmp_path / "a", base_model_name_or_path="other")
    assert Adapter.load(tmp_path / "a").base == BaseRecord("other")


def test_broken_extras_are_named(saved: Path) -> None:
    (saved / "sideroad.json").write_text('{"base": {"nam": "x"}}')
    with pytest.raises(AdapterError, match=r'"base" is .* allowed: licence, name, sha256, source'):
        Adapter.load(saved)
    (saved / "sideroad.json").write_text('{"config": {"targetz": "x"}}')
    with pytest.raises(AdapterError, match=r'unknown key "targetz".* Delete "config" there'):
        Adapter.load(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"manifest": {"base": 1}}, 'manifest has the key "base", which save writes itself'),
        ({"manifest": {"x": float("nan")}}, "manifest, foreign fields, names or card are not JSON"),
        ({"manifest": {"x": object()}}, "manifest, foreign fields, names or card are not JSON"),
        ({"foreign": {"use_qalora": True}}, "use_qalora is set"),
        ({"weights": {}}, "there is no pair of lora_A and lora_B at all"),
        ({"weights": {"q_proj": {"A": torch.ones(2, 3)}}}, r"q_proj.A has no partner q_proj.B"),
        ({"weights": {"q_proj": {**pair(), "C": torch.ones(1)}}}, "has a tensor 'C'; known: A, B, magnitude, bias"),
        (
            {"weights": {"q_proj": {**pair(), "bias": torch.ones(6)}}},
            "there is a bias for q_proj, but the configuration",
        ),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        adapter(**changes).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


TENSORS = {
    "rank": ({"A": torch.ones(2, 4), "B": torch.ones(6, 3)}, "have ranks 2 and 3"),
    "nan": ({"A": torch.full((2, 4), torch.nan), "B": torch.ones(6, 2)}, "has 8 of 8 values that are NaN or infinite"),
    "inf": ({"A": torch.ones(2, 4), "B": torch.ones(6, 2) / 0}, r"lora_B.weight has 12 of 12 values"),
    "empty": ({"A": torch.ones(0, 4), "B": torch.ones(6, 0)}, r"is empty \(shape \[0, 4\]\); .*sharded model"),
    "conv": ({"A": torch.ones(2, 4, 3, 3), "B": torch.ones(6, 2)}, "expected .rank, in. and .out, rank."),
    "groups": ({"A": torch.ones(5, 4, 3, 3), "B": torch.ones(6, 2, 1, 1)}, "have ranks 5 and 2"),
    "bare": ({"A": torch.ones(4), "B": torch.ones(6, 2)}, r"lora_A.weight has shape \[4\]; expected 2 dimensions"),
    "type": ({"A": torch.ones(2, 4).int(), "B": torch.ones(6, 2)}, r"type torch.int32; allowed: float32, bfloat16"),
    "half": ({"A": torch.ones(2, 4)}, r"lora_A.weight has no partner base_model.model.q_proj.lora_B.weight"),
    "bias": (
        {"A": torch.ones(2, 4), "B": torch.ones(6, 2), "bias": torch.ones(5)},
        "has 5 values; the layer has 6 outputs",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, case: str) -> None:
    leaves, words = TENSORS[case]
    adapter(weights={"q_proj": pair()}).save(tmp_path / "a")
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"}
    rewrite(tmp_path / "a", leaves, lambda leaf: f"base_model.model.q_proj.{names[leaf]}")
    with pytest.raises(AdapterError, match=words):
        Adapter.load(tmp_path / "a")


def test_everything_wrong_comes_at_once(saved: Path) -> None:
    edit(saved, use_qalora=True, modules_to_save=["score"])
    root = "base_model.model."
    rewrite(saved, {
        f"{root}q_proj.lora_A.weight": torch.ones(2, 4), f"{root}q_proj.lora_E": torch.ones(3),
        f"{root}score.weight": torch.ones(3, 3), f"{root}v_proj.lora_B.weight": torch.full((1, 1), torch.nan),
    })  # fmt: skip
    with pytest.raises(AdapterError, match=r"cannot be used: 5 problems") as caught:
        Adapter.load(saved)
    for words in ("use_qalora", "AdaLoRA", "no partner", "NaN"):
        assert words in str(caught.value)


def test_shards_are_read(saved: Path) -> None:
    value = Adapter.load(saved)
    single = saved / "adapter_model.safetensors"
    tensors = tensor_files.read_tensors(single)
    single.unlink()
    places = {key: f"adapter_model-0000{n % 2 + 1}-of-00002.safetensors" for n, key in enumerate(tensors)}
    for place in set(places.values()):
        write_tensors(saved / place, {key: tensors[key] for key in tensors if places[key] == place})
    index = saved / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert Adapter.load(saved).same_weights(value)
    Adapter.load(saved).save(saved)
    assert sorted(os.listdir(saved)) == ["adapter_config.json", "adapter_model.safetensors", "sideroad.json"]
    index.write_text("{}")
    with pytest.raises(AdapterError, match="holds both"):
        Adapter.load(saved)


def test_the_advice_for_a_pickle_works(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = Adapter.load(saved)
    single = saved / "adapter_model.safetensors"
    torch.save(tensor_files.read_tensors(single), saved / "adapter_model.bin")
    single.unlink()
    with pytest.raises(AdapterError, match="a pickle, which can run code when it is opened; it is not read") as caught:
        Adapter.load(saved)
    advice = "\n".join(line.strip() for line in str(caught.value).splitlines() if line.startswith("    "))
    assert "weights_only=True" in advice
    exec(advice, {})
    (saved / "adapter_model.bin").unlink()
    assert Adapter.load(saved).same_weights(value)


def test_paths_that_are_something_else(tmp_path: Path, saved: Path) -> None:
    def words(path: Path) -> str:
        with pytest.raises(AdapterError) as caught:
            Adapter.load(path)
        return str(caught.value)

    assert 'Did you mean "adapter"?' in words(saved.rename(tmp_path / "adapter").with_name("adaptor"))
    assert "is a file; give the directory" in words(tmp_path / "adapter/adapter_model.safetensors")
    assert "is not an adapter itself; it holds adapter. Give one of them" in words(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    assert "has no adapter_config.json, so it is not an adapter. It holds: nothing." in words(model)
    (model / "config.json").write_text("{}")
    assert "is a model directory (config.json), not an adapter" in words(model)
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter.safetensors")
    assert "no adapter_model.safetensors. Did you mean" in words(tmp_path / "adapter")


def test_unknown_fields_can_be_allowed(saved: Path) -> None:
    edit(saved, novelty=3)
    with pytest.raises(AdapterError, match="unknown field novelty is set"):
        Adapter.load(saved)
    value = Adapter.load(saved, allow_unknown=("novelty",))
    assert value.foreign == {"novelty": 3}
    value.save(saved)
    assert json.loads((saved / "adapter_config.json").read_text())["novelty"] == 3


def test_other_directories_are_not_replaced(tmp_path: Path, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"is not replaced: it holds notes\.txt, which no adapter has"):
        adapter().save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    (tmp_path / "card").mkdir()
    (tmp_path / "card/README.md").write_text("x")
    with pytest.raises(AdapterError, match=r"is not empty and has no adapter_config\.json"):
        adapter().save(tmp_path / "card")


def test_the_old_adapter_outlives_a_full_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Adapter.load(saved)
    real = files.write_bytes

    def full(path: Path, content: bytes) -> None:
        real(path, content[: len(content) // 2])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tensor_files, "write_bytes", full)
    with pytest.raises(AdapterError, match=r"No space left on device.*untouched"):
        adapter(weights={"q_proj": pair()}).save(saved)
    assert Adapter.load(saved).same_weights(before)
    assert [entry.name for entry in saved.parent.iterdir()] == ["a"]


def test_a_file_that_reads_back_differently_is_not_put_in_place(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Adapter.load(saved)
    real = files.write_bytes
    monkeypatch.setattr(tensor_files, "write_bytes", lambda path, data: real(path, data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(AdapterError, match="reads back differently"):
        adapter(weights={"q_proj": pair()}).save(saved)
    assert Adapter.load(saved).same_weights(before)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
          "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_type", "task_type", "lora_dropout", "use_rslora",
          "base_model_name_or_path", "use_dora", "novelty")  # fmt: skip


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3))
def test_no_configuration_crashes_and_an_accepted_one_can_be_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    value = adapter()
    value.save(tmp_path / "a")
    edit(tmp_path / "a", **changes)
    try:
        loaded = Adapter.load(tmp_path / "a")
    except AdapterError:
        return
    assert loaded.same_weights(value)
    loaded.save(tmp_path / "b")
    again = Adapter.load(tmp_path / "b")
    assert again.config == loaded.config
    assert [again.scale(path) for path in value.paths] == [loaded.scale(path) for path in value.paths]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_files_raise_adapter_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    adapter().save(tmp_path / "a")
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "sideroad.json"]))
    content = bytearray((tmp_path / "a" / name).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for bit in data.draw(st.lists(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=3)):
            content[bit // 8] ^= 1 << bit % 8
    (tmp_path / "a" / name).write_bytes(content)
    try:
        found = Adapter.load(tmp_path / "a")
    except AdapterError:
        return
    assert set(found.paths) == set(adapter().paths)
