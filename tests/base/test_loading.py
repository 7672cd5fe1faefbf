"""Local directories and hub ids: what is loaded, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from sideroad.base.catalog import CATALOG
from sideroad.base.config import BaseConfig
from sideroad.base.loading import load_base, load_meta, load_tokenizer
from sideroad.errors import BaseModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def directory(shared_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(shared_model_dir, tmp_path / "mine"))


def config_of(path: Path, **changes: str) -> BaseConfig:
    return BaseConfig(**{"model": str(path), "dtype": "float32", "device": "cpu", **changes})


def change(path: Path, **values: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_directory(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (directory / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Card\n")
    base = load_base(config_of(directory))
    expected = load_file(directory / "model.safetensors")
    state = base.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.identity.to_json() == {
        "name": "mine",
        "source": "mine",
        "sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "licence": "mit",
        "parameters": sum(tensor.numel() for tensor in expected.values()),
    }
    assert (base.dtype, base.device) == (torch.float32, torch.device("cpu"))
    assert base.notes == ("float32: as the recipe says",)
    assert base.tokenizer("hi").input_ids == tiny_tokenizer()("hi").input_ids
    assert capfd.readouterr() == ("", "")


def test_the_dtype_is_probed_or_given(directory: Path) -> None:
    given = load_base(config_of(directory, dtype="auto"), dtype=torch.bfloat16)
    assert given.dtype == next(given.model.parameters()).dtype == torch.bfloat16
    assert given.notes == ("bfloat16: given by the caller",)
    probed = load_base(config_of(directory, dtype="auto"))
    assert "a probe product took" in probed.notes[0]
    assert load_base(config_of(directory, dtype="auto"), dtype=probed.dtype).dtype == probed.dtype


def test_several_files_have_one_checksum_and_changes_are_seen(directory: Path) -> None:
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tiny_llama().save_pretrained(directory, max_shard_size="60KB")
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 1
    first = load_base(config_of(directory)).identity
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert first.sha256 == hashlib.sha256("\n".join(sums).encode()).hexdigest()
    assert first.parameters == sum(tensor.numel() for tensor in whole.values())
    tensors = load_file(files[0])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, files[0], metadata={"format": "pt"})
    assert load_base(config_of(directory)).identity.sha256 != first.sha256


def test_pickles_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"weights as pytorch_model.bin, which may run code.*writes safetensors"):
        load_base(config_of(directory))


def test_quantised_checkpoints_are_refused_by_name(directory: Path) -> None:
    change(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    for load in (load_base, load_meta):
        with pytest.raises(BaseModelError, match=r'"mine" is a quantised checkpoint \(gptq\)'):
            load(config_of(directory))


def test_missing_and_misshapen_tensors_are_listed(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["extra"] = torch.ones(1)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError) as caught:
        load_base(config_of(directory))
    message = str(caught.value)
    assert "lack 1 tensors that its architecture needs: model.layers.0.mlp.up_proj.weight" in message
    assert '"model.norm.weight" has shape [7]; config.json asks for [32]' in message


def test_unexpected_tensors_are_noted(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "extra": torch.ones(1)}, directory / "model.safetensors", metadata={"format": "pt"})
    assert "ignored tensors the model has no place for: extra" in load_base(config_of(directory)).notes


def test_a_torn_file(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"the weights of .*mine cannot be read"):
        load_base(config_of(directory))


def test_parts_that_are_missing(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match=r"has no tokenizer \(none of tokenizer.json"):
        load_tokenizer(config_of(directory))
    (directory / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"has no config.json, so it is no model directory. Named models: smollm2"):
        load_base(config_of(directory))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"holds no \*.safetensors weights. Found: nothing"):
        load_base(config_of(tmp_path / "empty"))
    (tmp_path / "weights.safetensors").write_text("")
    with pytest.raises(BaseModelError, match=r"is a file, but not a .gguf; give the directory"):
        load_base(config_of(tmp_path / "weights.safetensors"))


def test_a_padding_token_is_made(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("pad_token")
    file.write_text(json.dumps(values))
    base = load_base(config_of(directory))
    assert base.tokenizer.pad_token == "<|im_end|>"
    assert 'the tokenizer has no padding token; "<|im_end|>" is used' in base.notes


def test_a_hub_id_offline() -> None:
    for load in (load_base, load_meta):
        with pytest.raises(BaseModelError, match=r'"owner/no-such-model".*offline is set; run once without it'):
            load(BaseConfig(model="owner/no-such-model", device="cpu"), offline=True)


def test_foreign_code_is_refused(directory: Path) -> None:
    change(directory, model_type="own_kind", auto_map={"AutoConfig": "code.OwnConfig"})
    (directory / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BaseModelError, match=r"needs code from its repository, which sideroad never runs"):
        load_base(config_of(directory))


def test_a_device_that_is_not_there(directory: Path) -> None:
    with pytest.raises(BaseModelError, match=r'"cuda:99" is not there. torch sees: .*cpu; or use auto'):
        load_base(config_of(directory, device="cuda:99"))


def kinds(model: nn.Module) -> Counter[str]:
    return Counter(type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("name", CATALOG)
def test_named_models_have_their_shape_without_a_download(name: str) -> None:
    model = load_meta(BaseConfig(model=name), offline=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == CATALOG[name].parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    layers = {"smollm2-135m-instruct": ("LlamaForCausalLM", 211), "all-minilm-l6-v2": ("BertModel", 37)}[name]
    assert (type(model).__name__, kinds(model)["Linear"]) == layers


def test_the_shape_of_a_directory_needs_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    model = load_meta(config_of(directory))
    real = tiny_llama()
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == {
        name: tensor.shape for name, tensor in real.named_parameters()
    }
