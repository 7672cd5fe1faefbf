"""What a base model is, so that an adapter can say which one it belongs to."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sideroad.base.cache import cache_dir
from sideroad.base.fetch import sha256_of
from sideroad.errors import BaseModelError

logger = logging.getLogger("sideroad.base.identity")


@dataclass(frozen=True)
class BaseIdentity:
    """Name, origin, checksum and licence of a base model.

    Attributes:
        name: what a person calls it: the catalogue's name, a hub id, or a directory's or file's name.
        source: `package version`, `hub id@commit`, or the directory's or file's name; never a whole path.
        sha256: of the weights as published: of the GGUF file, or over the safetensors files (`weights_sha256`).
        licence: as the catalogue, the model card or the GGUF file states it; None where none of them does.
        parameters: count, tied weights once.
    """

    name: str
    source: str
    sha256: str
    licence: str | None
    parameters: int

    def to_json(self) -> dict[str, str | int | None]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def weights_files(directory: Path) -> list[Path]:
    """Return a directory's safetensors files, sorted by name.

    Raises:
        BaseModelError: there is none; says so plainly when there are pickles instead.
    """
    found = sorted(directory.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickles:
        raise BaseModelError(
            f"{directory} holds its weights as {', '.join(pickles[:3])}, which may run code when read; only "
            "safetensors are read. Convert it once, on a machine where you trust the file: "
            "transformers' `AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)` writes safetensors."
        )
    listed = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
    raise BaseModelError(f"{directory} holds no *.safetensors weights. Found: {listed}.")


def weights_sha256(files: Sequence[Path]) -> str:
    """Return one SHA-256 for a model's weights.

    For one file it is that file's; for several, that of their checksums in the given order, one per line. Checksums
    are remembered in the cache by path, size and time of change.
    """
    sums = [_remembered_sha256(path) for path in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def licence_in(directory: Path) -> str | None:
    """Return the `license` of a model card's front matter (README.md), or None."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text.split("---", 2)[1])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    if licence == "other" and isinstance(front.get("license_name"), str):
        licence = front["license_name"]
    return licence if isinstance(licence, str) else None


def _remembered_sha256(path: Path) -> str:
    status = path.stat()
    key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
    store = cache_dir() / "checksums.json"
    known = _read_store(store)
    entry = known.get(key)
    if isinstance(entry, list) and entry[:2] == stamp:
        return str(entry[2])
    found = sha256_of(path)
    _write_store(store, {**_read_store(store), key: [*stamp, found]})
    return found


def _read_store(store: Path) -> dict[str, Any]:
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_store(store: Path, known: dict[str, Any]) -> None:
    # Only a memory: where it cannot be written, the next run computes the sum again.
    name = None
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=store.parent, prefix=".checksums-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(known, stream, indent=1)
        os.replace(name, store)
    except OSError as error:
        logger.debug("checksums are not remembered: %s", error)
        if name:
            with suppress(OSError):
                os.unlink(name)
