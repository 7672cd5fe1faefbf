"""A GGUF file, converted once to a directory of safetensors, configuration and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import safe_open
from tokenizers import Regex, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as gguf_reader

from sideroad.base.cache import CONVERTER_VERSION
from sideroad.base.quiet import quiet
from sideroad.errors import BaseModelError
from sideroad.files import system_errors

logger = logging.getLogger("sideroad.base.convert")

_CHECK_TEXTS = ("In 2024,\n\n12 plus  345 is 357.", "def f(x):\n\treturn x['k'] != 3.14  # café 北京", " I'll  go")
# What transformers and the gguf package raise on a file they cannot read.
_REFUSALS = (ValueError, KeyError, RuntimeError, OSError, ImportError)
_SHARD = "200GB"
_SPLIT_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def convert_gguf(file: Path, entry: Path) -> dict[str, Any]:
    """Write a GGUF model to `entry` as safetensors, `config.json` and tokenizer files, and check them.

    The weights are stored in the smallest type that holds every dequantised value exactly (bfloat16, float16, else
    float32). Tied embeddings are stored once. The file's chat template and special tokens are kept.

    Returns:
        The converter's part of the record: versions, storage type, tokenizer rule, licence, parameter count.
    Raises:
        BaseModelError: not a GGUF file, an architecture that cannot be read, or a check that fails.
    """
    metadata = read_metadata(file)
    try:
        with quiet():
            model, dtype = _dense_model(file)
            rule = _save_tokenizer(file, metadata, model.config, entry)
    except _REFUSALS as error:
        raise BaseModelError(f"{file.name} cannot be converted: {type(error).__name__}: {error}") from error
    with quiet(), system_errors():  # a full disk is nothing about the file: the cache says what to do
        model.save_pretrained(entry, max_shard_size=_SHARD)
    _check_weights(model, entry)
    return {
        "converter": CONVERTER_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "pre_tokenizer": rule,
        "licence": metadata.get("general.license"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def read_metadata(file: Path) -> Mapping[str, Any]:
    """Return a GGUF file's scalar metadata by key; arrays (the vocabulary) are left out.

    Raises:
        BaseModelError: the file cannot be read as GGUF, or is one part of several.
    """
    try:
        fields = GGUFReader(str(file)).fields
        scalars = {name: field.contents() for name, field in fields.items() if len(field.types) == 1}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise BaseModelError(f"{file} cannot be read as a GGUF file: {error}") from error
    parts = scalars.get("split.count", 1)
    if parts > 1:
        raise BaseModelError(f"{file.name} is one of {parts} parts; join them first with llama.cpp's gguf-split.")
    return scalars


def gguf_config(file: Path) -> Any:
    """Return a GGUF model's transformers configuration, as a plain (not quantised) model's; reads no weights.

    Raises:
        BaseModelError: the architecture is not one that transformers reads from GGUF.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except _REFUSALS as error:
        raise BaseModelError(f"{file.name} cannot be read: {type(error).__name__}: {error}") from error
    return _plain(config)


def _plain(config: Any) -> Any:
    values = config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "gguf_file"):
        values.pop(key, None)
    return type(config).from_dict(values)


@contextmanager
def _no_bar() -> Iterator[None]:
    # The reader draws its own progress bar, which transformers' switch for bars does not reach.
    shown = getattr(gguf_reader, "tqdm", None)
    if shown is None:
        yield
        return
    gguf_reader.tqdm = lambda items, *_, **__: items
    try:
        yield
    finally:
        gguf_reader.tqdm = shown


def _dense_model(file: Path) -> tuple[Any, torch.dtype]:
    with _no_bar():
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    state = loaded.state_dict()
    dtype = _exact_dtype(state)
    config = _plain(loaded.config)
    config.dtype = dtype
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # A model made from the plain configuration carries no mark of quantisation, so it can be saved.
    dense.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    dense.config.architectures = [type(dense).__name__]
    return dense, dtype


def _exact_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in state.values()):
            return dtype
    return torch.float32


def _save_tokenizer(file: Path, metadata: Mapping[str, Any], config: Any, entry: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    rule = _set_splitting(tokenizer, metadata)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        tokenizer.chat_template = template
    for kind in ("bos", "eos", "padding", "unknown"):
        index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if index is not None:
            short = {"padding": "pad", "unknown": "unk"}.get(kind, kind)
            setattr(tokenizer, f"{short}_token", tokenizer.convert_ids_to_tokens(int(index)))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.name_or_path = ""
    tokenizer.save_pretrained(entry)
    _check_tokenizer(tokenizer, metadata, entry)
    return rule


def _set_splitting(tokenizer: Any, metadata: Mapping[str, Any]) -> str:
    """Set how text is cut before byte-pair merging, which transformers does not take from the file for every model."""
    named = str(metadata.get("tokenizer.ggml.pre", "default"))
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return f"{named} (as transformers reads it)"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if named == "smollm":
        # Each digit alone, and only then the GPT-2 pattern: "\n\n1" keeps both line breaks in one token.
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    elif named == "gpt-2":
        cut = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_SPLIT_GPT2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    else:
        return f"{named} (as transformers reads it)"
    tokenizer.backend_tokenizer.pre_tokenizer = cut
    return named


def _check_tokenizer(tokenizer: Any, metadata: Mapping[str, Any], entry: Path) -> None:
    again = AutoTokenizer.from_pretrained(str(entry), local_files_only=True)
    wrong = [text for text in _CHECK_TEXTS if again(text).input_ids != tokenizer(text).input_ids]
    if wrong:
        raise BaseModelError(f"the converted tokenizer reads {wrong[0]!r} differently after saving")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and again.chat_template != template:
        raise BaseModelError("the converted tokenizer lost the file's chat template")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None and again.eos_token_id != eos:
        raise BaseModelError(f"the converted tokenizer ends text with id {again.eos_token_id}; the file says {eos}")


def _check_weights(model: nn.Module, entry: Path) -> None:
    expected = model.state_dict()
    seen = 0
    for path in sorted(entry.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if not torch.equal(stored.get_tensor(name), expected[name]):
                    raise BaseModelError(f"{path.name}: {name} differs from what was converted")
                seen += 1
    if seen == 0:
        raise BaseModelError("the conversion wrote no weights")
