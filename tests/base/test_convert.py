"""A tiny model written as GGUF comes back with the same logits, tokens and template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tiny import CHATML, SPECIAL, file_size_limit, tiny_llama, tiny_tokenizer

from sideroad.base.catalog import CATALOG
from sideroad.base.config import BaseConfig
from sideroad.base.loading import load_base, load_meta
from sideroad.errors import BaseModelError

HEADS, KEY_HEADS, VOCABULARY = 4, 2, 260
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "cache"))


def tiny_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=True, rms_norm_eps=1e-5)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of each rotated head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    block, inner = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{block}.{NAMES[inner]}.weight"


def write_gguf(path: Path, model: torch.nn.Module, *, rule: str = "smollm", parts: int = 1) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_license("mit")
    if parts > 1:
        writer.add_uint16("split.count", parts)
    tokens = [token for token, _ in sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([*tokens, "ĊĊ"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCABULARY - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = paired(weight, HEADS if "q_proj" in name else KEY_HEADS)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(path: Path) -> BaseConfig:
    return BaseConfig(model=str(path), dtype="float32", device="cpu")


@pytest.mark.parametrize(("kept", "stored"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_the_round_trip(tmp_path: Path, kept: torch.dtype, stored: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(kept)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    capfd.readouterr()
    base = load_base(config_of(path))
    assert capfd.readouterr() == ("", "")
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert getattr(base.model.config, "quantization_config", None) is None
    assert base.identity.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (base.identity.name, base.identity.source, base.identity.licence) == ("tiny", "tiny.gguf", "mit")
    assert base.identity.parameters == sum(item.numel() for item in model.parameters())
    assert base.notes[0] == f"weights converted from GGUF, kept as {stored}; tokenizer splits text by rule smollm"


def test_the_tokenizer_keeps_rule_template_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_base(config_of(write_gguf(tmp_path / "tiny.gguf", tiny_model()))).tokenizer
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 512
    # Digits are cut off first, so the two line breaks before one stay together.
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1").input_ids) == ["ĊĊ", "1"]
    other = load_base(config_of(write_gguf(tmp_path / "other.gguf", tiny_model(), rule="gpt-2"))).tokenizer
    assert other.convert_ids_to_tokens(other("\n\n1").input_ids) == ["Ċ", "Ċ", "1"]


def test_converted_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    seen: list[str] = []
    load_base(config_of(path), on_progress=lambda item: seen.append(item.stage))
    load_base(config_of(path), on_progress=lambda item: seen.append(item.stage))
    assert seen == ["convert", "load", "load"]
    [record] = [json.loads(file.read_text()) for file in tmp_path.glob("cache/models/*/sideroad-source.json")]
    assert record["converter"] == 1
    assert {"torch", "transformers", "sha256", "dtype", "licence", "parameters", "files"} <= set(record)


def test_the_shape_of_a_gguf_needs_no_conversion(tmp_path: Path) -> None:
    model = load_meta(config_of(write_gguf(tmp_path / "tiny.gguf", tiny_model())))
    assert sum(item.numel() for item in model.parameters()) == sum(item.numel() for item in tiny_model().parameters())
    assert not (tmp_path / "cache").exists()


def test_files_that_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough to have a header")
    with pytest.raises(BaseModelError, match=r"text.gguf cannot be read as a GGUF file"):
        load_base(config_of(tmp_path / "text.gguf"))
    parts = write_gguf(tmp_path / "parts.gguf", tiny_model(), parts=3)
    with pytest.raises(BaseModelError, match=r"parts.gguf is one of 3 parts; join them first"):
        load_base(config_of(parts))
    assert not [path for path in tmp_path.glob("cache/models/*") if path.is_dir()]


def test_a_full_disk_while_converting(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    with (
        file_size_limit(100_000),
        pytest.raises(BaseModelError, match=r"cannot write to the model cache at .*Free space or set SIDEROAD_CACHE"),
    ):
        load_base(config_of(path))
    assert not [entry for entry in tmp_path.glob("cache/models/*") if entry.is_dir()]
    load_base(config_of(path))


@pytest.mark.all
def test_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDEROAD_CACHE")
    base = load_base(BaseConfig(model="smollm2-135m-instruct", dtype="float32", device="cpu"))
    assert base.identity.parameters == CATALOG["smollm2-135m-instruct"].parameters
    shipped = CATALOG["smollm2-135m-instruct"].config()
    values = base.model.config.to_dict()
    assert {key: values[key] for key in shipped if key != "dtype"} == {
        key: value for key, value in shipped.items() if key != "dtype"
    }
    assert base.tokenizer.convert_ids_to_tokens(base.tokenizer("\n\n12").input_ids) == ["ĊĊ", "1", "2"]
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    from sideroad.base.generation import generate

    [answer] = generate(base, [prompt], max_new_tokens=12)
    assert base.tokenizer.decode(answer) == "The capital of France is Paris."
