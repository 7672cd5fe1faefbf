"""Files both ways between PEFT and us: same keys, same bits, same logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import tiny_gpt2
from tiny import tiny_llama
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.errors import AdapterError
from sideroad.tensor_files import read_tensors, same_bits

peft = pytest.importorskip("peft")


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\..*(up|down)_proj"}),
    "rslora": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {r"layers\.0\.self_attn\..*": 2, "down_proj": 3},
            "alpha_pattern": {"self_attn.k_proj": 20, r".*\.1\.mlp\.down_proj": 7},
        },
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "exclude": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\.self_attn\.q_proj"}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "gaussian": ("llama", {"target_modules": ["v_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "lora_alpha": 6}),
    "conv1d all": ("gpt2", {"target_modules": "all-linear"}),
    "bias adapted": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    "bias all": ("gpt2", {"target_modules": ["attn.c_proj"], "bias": "all"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "lora_alpha": 5}),
    "dora conv1d": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True, "use_rslora": True}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) % 100
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


def peft_model(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A fresh base, and a PEFT model over a copy of it whose adapter is not the identity."""
    kind, fields = CASES[case]
    base = MODELS[kind]().to(dtype)
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **fields})
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw).mul(0.2).to(dtype)
        elif parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=draw).mul(0.2).to(dtype)
    return base, model.eval()


def same_files(left: Path, right: Path) -> None:
    ours, theirs = (read_tensors(path / "adapter_model.safetensors") for path in (left, right))
    assert set(ours) == set(theirs)
    assert all(same_bits(ours[key], theirs[key]) for key in ours)


def reload(base: nn.Module, directory: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory, autocast_adapter_dtype=False)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_writes_and_we_read(case: str, tmp_path: Path) -> None:
    base, model = peft_model(case)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    value = Adapter.load(tmp_path / "peft")
    expected, plain = logits(model), logits(base)
    attach(base, value)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_we_write_and_peft_reads(case: str, tmp_path: Path) -> None:
    base, model = peft_model(case)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    Adapter.load(tmp_path / "peft").save(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "peft")
    assert torch.equal(logits(reload(base, tmp_path / "ours")), logits(reload(base, tmp_path / "peft")))
    torch.testing.assert_close(logits(reload(base, tmp_path / "ours")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_again_is_still_ours(case: str, tmp_path: Path) -> None:
    base, model = peft_model(case)
    model.save_pretrained(tmp_path / "first", save_embedding_layers=False)
    value = Adapter.load(tmp_path / "first")
    value.save(tmp_path / "ours")
    reload(base, tmp_path / "ours").save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = Adapter.load(tmp_path / "again")
    assert again.same_weights(value)
    assert [again.scale(path) for path in again.paths] == [value.scale(path) for path in value.paths]


@pytest.mark.parametrize("case", ["all-linear", "conv1d", "patterns", "bias all"])
def test_our_own_adapters_are_read_by_peft(case: str, tmp_path: Path) -> None:
    base, model = peft_model(case)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    attached = attach(copy.deepcopy(base), Adapter.load(tmp_path / "peft"), "mine")
    attached.adapter("mine").save(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "peft")
    torch.testing.assert_close(logits(reload(base, tmp_path / "ours")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    _, model = peft_model("plain", dtype)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    value = Adapter.load(tmp_path / "peft")
    value.save(tmp_path / "ours")
    assert value.config.dtype == "base"
    assert all(leaf.dtype == dtype for leaves in value.weights.values() for leaf in leaves.values())
    same_files(tmp_path / "ours", tmp_path / "peft")


def test_peft_adapters_in_subdirectories_are_pointed_to(tmp_path: Path) -> None:
    _, model = peft_model("plain")
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "peft", selected_adapters=["second"])
    with pytest.raises(AdapterError, match=r"it holds second\. Give one of them"):
        Adapter.load(tmp_path / "peft")
    assert Adapter.load(tmp_path / "peft/second").paths[0].endswith("q_proj")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_bias": True}, ("lora_bias is set", "a bias inside the pair")),
        ({"init_lora_weights": "pissa"}, ('init_lora_weights is "pissa"',)),
    ],
)
def test_what_peft_saves_and_we_lack_is_refused_by_name(
    fields: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"changes what|rewrote") as caught:
        Adapter.load(tmp_path / "a")
    for word in words:
        assert word in str(caught.value)


def test_a_converted_pissa_adapter_is_read(tmp_path: Path) -> None:
    base = tiny_llama()
    plain = copy.deepcopy(base)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    value = Adapter.load(tmp_path / "done")
    assert set(value.ranks.values()) == {8}
    attach(plain, value)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_a_copied_head_is_compared_with_the_base(tmp_path: Path) -> None:
    base, model = peft_model("head")
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    value = Adapter.load(tmp_path / "peft")
    other = copy.deepcopy(base)
    other.lm_head.weight.data += 1
    with pytest.raises(AdapterError, match="a copy of the base's weight beside its pair, which is not this base's"):
        attach(other, value)
    attach(base, value)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=1e-5)
    value.save(tmp_path / "ours")
    assert not [key for key in read_tensors(tmp_path / "ours/adapter_model.safetensors") if "base_layer" in key]


def adalora(steps: int, **fields: Any) -> Any:
    """PEFT's AdaLoRA after some of its 8 steps, of which the sixth is the last that takes ranks away."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, tinit=1, tfinal=2, deltaT=1, total_step=8, task_type="CAUSAL_LM",
        **{"target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 5, **fields},
    )  # fmt: skip
    model = peft.get_peft_model(tiny_llama(), config)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    ids = torch.arange(12)[None]
    for step in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (0, {}), (0, {"lora_alpha": 0, "modules_to_save": ["lm_head"]}), (4, {}), (8, {}),
        (8, {"target_modules": "all-linear", "exclude_modules": ".*gate_proj"}),
        (8, {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ],
)  # fmt: skip
def test_an_adalora_adapter_is_read_as_the_lora_that_it_is(steps: int, fields: dict[str, Any], tmp_path: Path) -> None:
    adalora(steps, **fields).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    expected = logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft"))
    base = tiny_llama()
    assert (expected - logits(base)).abs().max() > 1e-2
    value = Adapter.load(tmp_path / "peft")
    assert value.config.method.kind == "lora"
    if steps == 8:
        assert min(value.ranks.values()) < 4
        assert len(value.paths) < len([name for name, _ in base.named_modules() if name.endswith(("q_proj", "v_proj",
                                       "up_proj", "k_proj", "o_proj", "down_proj"))])  # fmt: skip
    attach(base, value)
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)
    value.save(tmp_path / "ours")
    assert Adapter.load(tmp_path / "ours").same_weights(value)
    torch.testing.assert_close(logits(reload(tiny_llama(), tmp_path / "ours")), expected, rtol=1e-5, atol=1e-5)
