"""An adapter of a PeftModel to a directory and back, in the words its LoraConfig was written in."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from sideroad.adapter import Adapter, BaseRecord, weight_findings
from sideroad.adapter_files import CONFIG, INDEX, MANIFEST, find_weights, refuse_elsewhere
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError, ConfigError, raise_findings
from sideroad.files import read_json
from sideroad.peft.config import LoraConfig, written
from sideroad.peft.lora_model import LoraModel
from sideroad.peft.stored import Stored
from sideroad.peft_fields import init_of, sift
from sideroad.peft_format import read_config
from sideroad.peft_keys import ROOT, from_tensors, module_key
from sideroad.peft_targets import our_targets
from sideroad.tensor_files import read_sharded, read_tensors, same_bits

COPY = ".base_layer.weight"
"""End of a tensor's name that holds the base's own weight: PEFT adds it to the file when a head is adapted."""


def value_of(tuner: LoraModel, name: str, weights: Mapping[str, Mapping[str, Tensor]] | None = None) -> Adapter:
    """Return an adapter as the value that is saved: its tensors on the CPU, its targets as the user wrote them.

    Args:
        weights: tensors to take instead of the live ones.
    """
    config, live = tuner.peft_config[name], tuner.handle.adapter(name)
    fields = written(config)
    said = our_targets(fields, list(live.paths))
    foreign, _ = sift(fields, source="LoraConfig")
    init_of(fields, foreign, "LoraConfig")
    if config.task_type is None:
        kind = type(tuner.model)
        foreign["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    base = live.base if live.base and live.base.name == config.base_model_name_or_path else None
    return replace(
        live,
        config=AdapterConfig.model_validate({**live.config.model_dump(), **said}),
        weights=live.weights if weights is None else weights,
        base=base or BaseRecord(config.base_model_name_or_path),
        task_type=None if config.task_type is None else str(config.task_type),
        foreign=foreign,
    )


def write_adapter(value: Adapter, directory: Path) -> None:
    """Write an adapter's files into a directory that may hold other things (a checkpoint's, other adapters).

    Each file is written whole beside its place, read back, and takes its place in one rename; the configuration last.

    Raises:
        AdapterError: as in `Adapter.save`; what was there is then untouched.
    """
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is a file; give a directory to save into.")
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".adapter.", suffix=".tmp") as spare:
        draft = Path(spare) / "adapter"
        value.save(draft)
        written = sorted((entry.name for entry in draft.iterdir()), key=lambda name: (name == CONFIG, name))
        for stale in {MANIFEST, INDEX} - set(written):
            (directory / stale).unlink(missing_ok=True)
        for name in written:
            os.replace(draft / name, directory / name)


def read_stored(directory: Path, model: nn.Module, config: LoraConfig | None = None) -> Stored:
    """Read an adapter that PEFT or we have written.

    Args:
        model: the base; a copy of its own weight in the file is passed over if it is the same.
        config: to be used in place of adapter_config.json.
    Raises:
        AdapterError: as in `Adapter.load`; or a copy of a base's weight that differs from this base's.
    """
    refuse_elsewhere(directory)
    allowed = (COPY[1:],)
    if config is None:
        content = read_json(directory / CONFIG)
        stored = Stored(
            LoraConfig.from_file(content, str(directory / CONFIG)), Adapter.load(directory, allow_unknown=allowed)
        )
    else:
        stored = Stored(config, _read_as(directory, config, allowed))
    _compare_copies(directory, model)
    return stored


def _read_as(directory: Path, config: LoraConfig, allowed: tuple[str, ...]) -> Adapter:
    """Read a directory's tensors under another configuration than its own."""
    weights, findings = from_tensors(_tensors(directory), leave_out=allowed)
    findings += weight_findings(weights, lambda p, leaf: module_key(p, leaf, adapted="A" in weights[p]))
    ranks = {} if findings else {path: leaves["A"].shape[0] for path, leaves in weights.items() if "A" in leaves}
    reading = read_config(written(config), ranks, source="the given config")
    raise_findings(AdapterError, f"{directory} cannot be used with this config", [*reading.findings, *findings])
    base = BaseRecord(reading.base_name) if reading.base_name else None
    return Adapter(reading.config, weights, base, reading.task_type, reading.foreign)


def _compare_copies(directory: Path, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    findings = []
    for key, copied in _tensors(directory).items():
        path = key.removeprefix(ROOT).removesuffix(COPY)
        if key.endswith(COPY) and path in modules:
            own: Any = getattr(modules[path], "weight", None)
            if own is None or not same_bits(own.detach().to("cpu", copied.dtype), copied):
                findings.append(
                    f"{key} is a copy of the weight of another base than this: its values differ. Load the base that "
                    "the adapter was trained on; if its embeddings were resized, resize them first"
                )
    raise_findings(AdapterError, f"{directory} does not fit this model", findings)


def _tensors(directory: Path) -> dict[str, Tensor]:
    source = find_weights(directory)
    return read_sharded(source) if source.name.endswith(".json") else read_tensors(source)


def refuse_options(ephemeral_gpu_offload: bool, key_mapping: Mapping[str, str] | None) -> None:
    """Raise ConfigError for options of loading that are not supported, by their names."""
    if ephemeral_gpu_offload:
        raise ConfigError("ephemeral_gpu_offload is not supported: adapters are made on the device of their layer.")
    if key_mapping:
        raise ConfigError("key_mapping is not supported: rename the tensors in the file.")


def warn_of_unsaved(tuner: LoraModel) -> None:
    """Warn of trainable parameters that belong to no adapter, and therefore to no file."""
    saved = {id(one) for name in tuner.handle.names for one in tuner.handle.parameters(name).values()}
    lost = [name for name, one in tuner.model.named_parameters() if one.requires_grad and id(one) not in saved]
    if lost:
        warnings.warn(
            f"{len(lost)} trainable parameters belong to no adapter and are not saved: {', '.join(lost[:3])}. Name "
            "their modules in modules_to_save.",
            stacklevel=3,
        )
