"""An adapter of a PeftModel to a directory and back, in the words its LoraConfig was written in."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from sideroad.adapter import Adapter, BaseRecord
from sideroad.adapter_files import CONFIG, INDEX, MANIFEST, directory_name, find_weights, refuse_elsewhere
from sideroad.base.vocabulary import published_rows
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError, ConfigError
from sideroad.files import json_text, read_json, refuse_odd_path, shown_path
from sideroad.peft.config import LoraConfig, written
from sideroad.peft.lora_model import LoraModel
from sideroad.peft.stored import Stored
from sideroad.peft.tensors import Parts
from sideroad.peft_fields import init_of, sift
from sideroad.peft_targets import our_targets
from sideroad.vocabulary import room_for, with_grown_rows


def value_of(tuner: LoraModel, name: str, parts: Parts | None = None, *, new_rows: bool = True) -> Adapter:
    """Return an adapter as the value that is saved: its tensors on the CPU, its targets as the user wrote them.

    Args:
        parts: tensors to take instead of the live ones.
        new_rows: add the rows that the vocabulary has beyond that of the base as it was published, where that is known.
    """
    config, live = tuner.peft_config[name], tuner.handle.adapter(name)
    fields = written(config)
    said = our_targets(fields, list(live.paths), live.kinds)
    foreign, _ = sift(fields, source="LoraConfig")
    init_of(fields, foreign, "LoraConfig")
    if config.task_type is None:
        kind = type(tuner.model)
        foreign["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    base = live.base if live.base and live.base.name == config.base_model_name_or_path else None
    value = replace(
        live,
        config=AdapterConfig.model_validate({**live.config.model_dump(), **said}),
        weights=live.weights if parts is None else parts.weights,
        modules=live.modules if parts is None else parts.modules,
        base=base or BaseRecord(config.base_model_name_or_path),
        task_type=None if config.task_type is None else str(config.task_type),
        foreign=foreign,
    )
    published = published_rows(tuner.model) if new_rows else None
    if published is None:
        return value
    return with_grown_rows(tuner.handle.survey(), tuner.model, value, published)


def write_adapter(value: Adapter, directory: Path) -> None:
    """Write an adapter's files into a directory that may hold other things (a checkpoint's, other adapters).

    Each file is written whole beside its place, read back, and takes its place in one rename; the configuration last.

    Raises:
        AdapterError: as in `Adapter.save`; what was there is then untouched.
    """
    refuse_odd_path(directory)
    try:
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
    except OSError as problem:
        raise AdapterError(
            f"{shown_path(directory)} cannot be written: {problem.strerror or problem}. Check the path, its "
            "permissions and the space on the disk."
        ) from problem


def own_place(directory: Path, name: str) -> Path:
    """Return where a directory of several adapters holds the one of that name; else the directory itself."""
    inner = directory / directory_name(name)
    return inner if name != "default" and (inner / CONFIG).is_file() else directory


def read_stored(directory: Path, config: LoraConfig | None = None) -> Stored:
    """Read an adapter that PEFT or we have written.

    Args:
        config: to be used in place of adapter_config.json.
    Raises:
        AdapterError: as in `Adapter.load`.
    """
    refuse_elsewhere(directory)
    if config is not None:
        return Stored(config, _read_as(directory, config))
    content = read_json(directory / CONFIG)
    return Stored(LoraConfig.from_file(content, str(directory / CONFIG)), Adapter.load(directory))


@contextmanager
def making_room(model: nn.Module, stored: Stored, trains_on: bool) -> Iterator[Stored]:
    """Resize a base as a stored adapter's recipe says, while it is put on; undone if it does not fit."""
    with room_for(model, stored.value, trains_on=trains_on) as value:
        yield replace(stored, value=value)


def _read_as(directory: Path, config: LoraConfig) -> Adapter:
    """Read a directory's tensors beside another configuration than its own."""
    find_weights(directory)
    with TemporaryDirectory(prefix="sideroad-") as spare:
        for file in directory.glob("adapter_model*"):
            shutil.copyfile(file, Path(spare) / file.name)
        (Path(spare) / CONFIG).write_text(json_text(written(config)), encoding="utf-8")
        try:
            return Adapter.load(spare)
        except AdapterError as error:
            raise AdapterError(str(error).replace(spare, f"{directory} under the given config")) from error


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
