"""The directory of prepared models: complete entries only, shared safely by several processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sideroad.base.catalog import CATALOG
from sideroad.base.progress import OnProgress, Progress
from sideroad.errors import BaseModelError, did_you_mean

CONVERTER_VERSION = 1
"""Raised when converted files change; older entries are then prepared anew."""

RECORD = "sideroad-source.json"
"""Name of the record in each entry: where it came from, and the size of each file."""

logger = logging.getLogger("sideroad.base.cache")

Build = Callable[[Path, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One prepared model in the cache.

    Attributes:
        name: named model, or `gguf-<first digits of the file's checksum>`.
        bytes: size on disk.
    """

    name: str
    path: Path
    bytes: int


def cache_dir() -> Path:
    """Return where prepared models lie: SIDEROAD_CACHE, else XDG_CACHE_HOME/sideroad, else ~/.cache/sideroad."""
    own = os.environ.get("SIDEROAD_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache").absolute() / "sideroad"


def models_dir() -> Path:
    """Return the folder of entries inside the cache."""
    return cache_dir() / "models"


def entry_key(name: str, version: str) -> str:
    """Return the folder name of an entry; a new version or converter never meets an old folder."""
    return f"{name}--{version}--c{CONVERTER_VERSION}"


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return an entry's record when the entry is whole (every file there, with its size), else None."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        sizes: dict[str, int] = record["files"]
        whole = all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def cached(name: str) -> Path | None:
    """Return the directory of a named model when it is in the cache and whole, else None."""
    model = CATALOG.get(name)
    if model is None:
        return None
    path = models_dir() / entry_key(name, model.version)
    return path if read_record(path) is not None else None


def entries() -> tuple[Entry, ...]:
    """Return every entry in the cache, whole or not, sorted by name."""
    if not models_dir().is_dir():
        return ()
    found = sorted(path for path in models_dir().iterdir() if path.is_dir() and not path.name.startswith("."))
    return tuple(Entry(path.name.split("--")[0], path, _size(path)) for path in found)


def provide(key: str, build: Build, *, on_progress: OnProgress | None = None) -> Path:
    """Return a whole entry, building it if it is missing; only one process builds, the others wait for it.

    Args:
        key: folder name, see `entry_key`.
        build: called with (work folder, entry folder), both empty; fills the entry and returns its record. Both
            folders vanish if it fails, and a half-built entry is never visible under its key.
    Raises:
        BaseModelError: the cache cannot be written.
    """
    final = models_dir() / key
    if read_record(final) is not None:
        return final
    with _locked(key, on_progress):
        if read_record(final) is not None:
            return final
        _sweep(key)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{key}-", dir=models_dir()))
        try:
            work, entry = partial / "work", partial / "entry"
            work.mkdir()
            entry.mkdir()
            record = dict(build(work, entry))
            record["files"] = {path.name: path.stat().st_size for path in sorted(entry.iterdir()) if path.is_file()}
            (entry / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            _flush(entry)
            if final.exists():
                logger.warning("the cached model at %s is damaged and is replaced", final)
                final.rename(partial / "damaged")
            entry.rename(final)
        except OSError as error:
            raise BaseModelError(
                f"cannot write to the model cache at {cache_dir()}: {error}. "
                "Free space or set SIDEROAD_CACHE to a folder that can be written."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def clear(name: str | None = None) -> int:
    """Remove a model from the cache, in every version; return the bytes freed.

    Args:
        name: an entry's name as `entries` gives it; None removes all of them.
    Raises:
        BaseModelError: no entry and no named model has this name.
    """
    present = entries()
    known = sorted({entry.name for entry in present})
    if name is not None and name not in known and name not in CATALOG:
        raise BaseModelError(
            f'no model named "{name}" in the cache at {cache_dir()}.{did_you_mean(name, [*known, *CATALOG])} '
            f"In the cache: {', '.join(known) or 'nothing'}."
        )
    freed = 0
    for entry in present:
        if name is None or entry.name == name:
            with _locked(entry.path.name, None):
                _sweep(entry.path.name)
                # Renamed first: a removal cut short leaves debris, never half a model.
                doomed = Path(tempfile.mkdtemp(prefix=f".partial-{entry.path.name}-", dir=models_dir()))
                entry.path.rename(doomed / "entry")
                shutil.rmtree(doomed)
            freed += entry.bytes
    return freed


def require_space(needed: int) -> None:
    """Raise BaseModelError when the disk of the cache has fewer than `needed` bytes free."""
    place = next(path for path in (models_dir(), *models_dir().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BaseModelError(
            f"the disk of the model cache at {cache_dir()} has {free / 1e6:,.0f} MB free; {needed / 1e6:,.0f} MB are "
            "needed. Free space, or set SIDEROAD_CACHE to a folder on another disk."
        )


@contextmanager
def _locked(key: str, on_progress: OnProgress | None) -> Iterator[None]:
    # The system drops the lock when its holder dies, so there is no stale lock to detect.
    try:
        models_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(models_dir() / f".{key}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process prepares %s; waiting for it", key)
            if on_progress:
                on_progress(Progress("waiting", key.split("--")[0]))
            lock.acquire(poll_interval=0.1)
    except OSError as error:
        raise BaseModelError(
            f"cannot write to the model cache at {cache_dir()}: {error}. Set SIDEROAD_CACHE to a folder that can be "
            "written."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sweep(key: str) -> None:
    # Called under the lock of `key`: whatever carries its prefix belongs to a process that died.
    for debris in models_dir().glob(f".partial-{key}-*"):
        logger.info("removing what an interrupted run left at %s", debris)
        shutil.rmtree(debris, ignore_errors=True)


def _flush(directory: Path) -> None:
    for path in directory.iterdir():
        # Some writers make files only their owner may read; a shared cache is read by others.
        path.chmod(0o644)
        with path.open("rb") as stream, suppress(OSError):
            os.fsync(stream.fileno())


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
