"""Loading a base: model, tokenizer and identity together, ready to be adapted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from sideroad.base.catalog import CATALOG
from sideroad.base.config import BaseConfig
from sideroad.base.dtype_probe import choose_dtype
from sideroad.base.fetch import is_offline
from sideroad.base.identity import BaseIdentity, licence_in, weights_files, weights_sha256
from sideroad.base.locate import Located, known_names, local_path, locate
from sideroad.base.progress import OnProgress, Progress
from sideroad.base.quiet import quiet
from sideroad.errors import BaseModelError, raise_findings

logger = logging.getLogger("sideroad.base.loading")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_LISTED = 8


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        model: in eval mode on `device`, no parameter requires a gradient.
        tokenizer: transformers tokenizer with a padding token.
        identity: which model this is.
        dtype: of the weights; pass it to `load_base` to load the same way again.
        notes: one line each on what was decided or noticed while loading, for people.
    """

    model: Any
    tokenizer: Any
    identity: BaseIdentity
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()


def load_base(
    config: BaseConfig,
    *,
    offline: bool = False,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress | None = None,
) -> Base:
    """Load the model a recipe names, fetching and converting it first where needed.

    Args:
        offline: never use the network; SIDEROAD_OFFLINE does the same.
        dtype: overrides `config.dtype`, and with it the probe; for replaying an earlier choice.
        on_progress: called with each `Progress` of a slow step.
    Raises:
        BaseModelError: the model is unknown, cannot be fetched or read, is quantised, lacks tensors, or its device is
            not there.
    """
    device = resolve_device(config.device)
    located = locate(config, offline=offline, on_progress=on_progress)
    arguments = _hub_arguments(config, located, offline)
    settings = _read_config(located, arguments)
    _refuse_quantised(located, settings)
    notes = list(located.notes)
    dtype, reason = _resolve_dtype(config, dtype, device)
    notes.append(reason)
    if on_progress:
        on_progress(Progress("load", located.name))
    model, report = _read_model(located, settings, dtype, arguments)
    _check_report(located, report)
    if report["unexpected_keys"]:
        notes.append(f"ignored tensors the model has no place for: {_some(report['unexpected_keys'])}")
    model = model.to(device).eval().requires_grad_(False)
    identity = _identify(located, settings, arguments, model)
    if located.named is not None:
        # Adapters record this name; the cache's path would mean nothing elsewhere.
        model.config._name_or_path = model.name_or_path = located.name
    tokenizer, note = _read_tokenizer(located, arguments)
    notes.extend(note)
    return Base(model, tokenizer, identity, dtype, device, tuple(notes))


def load_tokenizer(config: BaseConfig, *, offline: bool = False, on_progress: OnProgress | None = None) -> Any:
    """Load only the tokenizer of the model a recipe names; a missing named model is fetched whole.

    Raises:
        BaseModelError: the model or its tokenizer cannot be found or read.
    """
    located = locate(config, offline=offline, on_progress=on_progress)
    return _read_tokenizer(located, _hub_arguments(config, located, offline))[0]


def load_meta(config: BaseConfig, *, offline: bool = False) -> nn.Module:
    """Build the model a recipe names on the meta device: every module and shape, no weight.

    Named models need no download, directories no weights, and a hub id only its `config.json`. The model keeps the
    checkpoint's own class, so encoders work too.

    Raises:
        BaseModelError: the configuration cannot be found or read, or is of a quantised checkpoint.
    """
    named = CATALOG.get(config.model)
    path = None if named is not None else local_path(config)
    if named is not None:
        located = Located(named.name, named.name, named.source, named=named)
        values = named.config()
        settings = AutoConfig.for_model(values.pop("model_type"), **values)
    elif path is not None and path.is_file():
        from sideroad.base.convert import gguf_config, read_metadata

        read_metadata(path)
        located, settings = Located(str(path), path.stem, path.name), gguf_config(path)
    else:
        name = config.model if path is None else path.resolve().name
        located = Located(str(path or config.model), name, name, hub=path is None)
        settings = _read_config(located, _hub_arguments(config, located, offline))
    _refuse_quantised(located, settings)
    maker = _model_class(settings)
    with quiet(), torch.device("meta"):
        model: nn.Module = maker.from_config(settings) if hasattr(maker, "from_config") else maker(settings)
    return model.eval()


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `mps`, `cuda` or `cuda:N` into a device that is there.

    Raises:
        BaseModelError: torch does not see the device asked for.
    """
    mps = torch.backends.mps.is_available()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = [*(f"cuda:{index}" for index in range(count)), *(["mps"] if mps else []), "cpu"]
    if name == "auto":
        return torch.device("cuda" if count else "mps" if mps else "cpu")
    if name in present or (name == "cuda" and count):
        return torch.device(name)
    raise BaseModelError(f'base.device "{name}" is not there. torch sees: {", ".join(present)}; or use auto.')


def _resolve_dtype(config: BaseConfig, given: torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    if given is not None:
        return given, f"{str(given).removeprefix('torch.')}: given by the caller"
    if config.dtype != "auto":
        return _DTYPES[config.dtype], f"{config.dtype}: as the recipe says"
    choice = choose_dtype(device)
    return choice.dtype, choice.reason


def _hub_arguments(config: BaseConfig, located: Located, offline: bool) -> dict[str, Any]:
    # False, not None: None asks at the terminal whether to run the repository's code.
    arguments: dict[str, Any] = {"trust_remote_code": False}
    if located.hub:
        return arguments | {"revision": config.revision, "local_files_only": is_offline(offline)}
    return arguments | {"local_files_only": True}


def _read_config(located: Located, arguments: Mapping[str, Any]) -> Any:
    if not located.hub and not (Path(located.target) / "config.json").is_file():
        raise BaseModelError(f"{located.target} has no config.json, so it is no model directory. {known_names()}")
    with quiet():
        try:
            return AutoConfig.from_pretrained(located.target, **arguments)
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(located, "configuration", error, arguments) from error


def _refuse_quantised(located: Located, settings: Any) -> None:
    quantised = getattr(settings, "quantization_config", None)
    if quantised is None:
        return
    values = quantised if isinstance(quantised, dict) else quantised.to_dict()
    raise BaseModelError(
        f'base model "{located.name}" is a quantised checkpoint ({values.get("quant_method", "unknown method")}); '
        "only float32, bfloat16 and float16 checkpoints and .gguf files are read. Use the model it was made from."
    )


def _model_class(settings: Any) -> Any:
    architecture = next(iter(getattr(settings, "architectures", None) or ()), None)
    causal = type(settings) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if architecture is None:
        return AutoModelForCausalLM if causal else AutoModel
    if architecture.endswith(_CAUSAL_ENDINGS) and causal:
        return AutoModelForCausalLM
    return getattr(transformers, architecture, AutoModelForCausalLM if causal else AutoModel)


def _read_model(
    located: Located, settings: Any, dtype: torch.dtype, arguments: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    with quiet():
        try:
            model, report = _model_class(settings).from_pretrained(
                located.target,
                config=settings,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                # Wrong shapes are then listed in the report, all at once, instead of stopping at the first.
                ignore_mismatched_sizes=True,
                **arguments,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _unreadable(located, "weights", error, arguments) from error
    return model, report


def _check_report(located: Located, report: Mapping[str, Any]) -> None:
    findings = []
    if report["missing_keys"]:
        findings.append(
            f'the weights of "{located.name}" lack {len(report["missing_keys"])} tensors that its architecture needs: '
            f"{_some(report['missing_keys'])}. They would start at random; use a complete checkpoint."
        )
    for name, found, expected in sorted(report["mismatched_keys"])[:_LISTED]:
        findings.append(f'"{name}" has shape {list(found)}; config.json asks for {list(expected)}.')
    raise_findings(BaseModelError, f'base model "{located.name}"', findings)


def _identify(located: Located, settings: Any, arguments: Mapping[str, Any], model: nn.Module) -> BaseIdentity:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digest, licence, source = located.sha256, located.licence, located.source
    if located.hub:
        commit = getattr(settings, "_commit_hash", None)
        source = f"{source}@{commit}" if commit else source
        directory = _snapshot(located, arguments)
        licence = licence_in(directory)
        digest = weights_sha256(weights_files(directory))
    return BaseIdentity(
        located.name, source, digest or weights_sha256(weights_files(Path(located.target))), licence, parameters
    )


def _snapshot(located: Located, arguments: Mapping[str, Any]) -> Path:
    wanted = {key: arguments[key] for key in ("revision", "local_files_only")}
    # Optional: the card is fetched for its licence, and a repository without one is fine.
    cached_file(located.target, "README.md", _raise_exceptions_for_missing_entries=False, **wanted)
    return Path(cached_file(located.target, "config.json", **wanted)).parent


def _read_tokenizer(located: Located, arguments: Mapping[str, Any]) -> tuple[Any, list[str]]:
    if not located.hub and not any((Path(located.target) / name).is_file() for name in _TOKENIZER_FILES):
        raise BaseModelError(
            f"{located.target} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). "
            "Save the model's tokenizer into the directory."
        )
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(located.target, **arguments)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _unreadable(located, "tokenizer", error, arguments) from error
    if tokenizer.pad_token_id is not None:
        return tokenizer, []
    if tokenizer.eos_token is None:
        raise BaseModelError(
            f'the tokenizer of "{located.name}" has neither a padding nor an end-of-text token; '
            "set one in its tokenizer_config.json."
        )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, [f'the tokenizer has no padding token; "{tokenizer.eos_token}" is used']


def _unreadable(located: Located, part: str, error: Exception, arguments: Mapping[str, Any]) -> BaseModelError:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return BaseModelError(
            f'base model "{located.name}" needs code from its repository, which sideroad never runs. '
            "Use a model whose architecture is part of transformers."
        )
    if not located.hub:
        return BaseModelError(f"the {part} of {located.target} cannot be read: {type(error).__name__}: {said}")
    if part == "weights" and "safetensors" in str(error):
        return BaseModelError(
            f'"{located.name}" has no safetensors weights on the hub; pickles may run code and are not read. {said}'
        )
    how = (
        "It is not in the hub's cache, and offline is set; run once without it."
        if arguments["local_files_only"]
        else "Check the id, the revision and the network; a gated model needs `hf auth login`."
    )
    return BaseModelError(
        f'base model "{located.name}": its {part} cannot be had from the hub ({said}) {how} {known_names()}'
    )


def _some(names: Sequence[str] | set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_LISTED]) + (f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else "")
