"""Files written whole or not at all, and JSON read strictly."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sideroad.errors import AdapterError, SideroadError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""A value as JSON knows it."""

JSON_BYTES_ALLOWED = 64 * 1024 * 1024

_HUB_SNAPSHOT = re.compile(r"(?P<repository>.*/(?:models|datasets|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def regular_file(path: Path, error: type[SideroadError] = AdapterError) -> Path:
    """Return the real path of an ordinary file that lies where its directory says.

    A symbolic link out of the directory is refused: a shared archive could otherwise make us read any file. The one
    exception is a hub cache, whose snapshots link into their own `blobs`.

    Raises:
        SideroadError: of kind `error`; no such file, a link that leads elsewhere, or a pipe, device or directory.
    """
    try:
        real = path.resolve(strict=True)
        home = path.parent.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as problem:
        raise error(f"{path} cannot be read: {_reason(problem)}.") from problem
    snapshot = _HUB_SNAPSHOT.fullmatch(home.as_posix())
    if real.parent != home and not (snapshot and real.parent == Path(snapshot["repository"], "blobs")):
        raise error(f"{path} is a symbolic link to {real}, outside its directory. Copy the file itself there.")
    if not stat.S_ISREG(mode):
        raise error(f"{path} is not an ordinary file (a directory, pipe or device). Give a plain file.")
    return real


def read_json(path: Path, error: type[SideroadError] = AdapterError) -> dict[str, Any]:
    """Read a JSON object; NaN, Infinity, a repeated key and a second value in the file are errors.

    Raises:
        SideroadError: of kind `error`; unreadable, not JSON (with line and column), or not an object.
    """
    real = regular_file(path, error)
    try:
        size = real.stat().st_size
        if size > JSON_BYTES_ALLOWED:
            raise error(f"{path} holds {size} bytes; at most {JSON_BYTES_ALLOWED} are read as JSON.")
        text = real.read_bytes().decode("utf-8")
        return parse_object(text)
    except OSError as problem:
        raise error(f"{path} cannot be read: {_reason(problem)}.") from problem
    except json.JSONDecodeError as problem:
        raise error(
            f"{path} is not valid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}. "
            "Fetch the file again or mend that line."
        ) from problem
    except (ValueError, RecursionError) as problem:
        detail = "nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise error(f"{path} is not valid JSON: {detail}. Fetch the file again or mend it.") from problem


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object strictly.

    Raises:
        ValueError: not JSON, not an object, a key given twice, or a number JSON does not have.
    """
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{...}}, found {type(value).__name__}")
    return value


def json_text(value: JSON, *, sort_keys: bool = True) -> str:
    """Return strict JSON, indented by 2, ending in a newline.

    Raises:
        ValueError: NaN or Infinity.
        TypeError: something JSON does not have.
    """
    return json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False) + "\n"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk.

    Raises:
        OSError: as the system gives it; `replace_directory` turns it into a message.
    """
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, error: type[SideroadError] = AdapterError) -> None:
    """Write a file beside `path` and rename it there, so that a reader sees the old or the new one, never a part.

    Raises:
        SideroadError: of kind `error`; disk full, no permission. The old file is then untouched.
    """
    draft = _sibling(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(draft, content)
        os.replace(draft, path)
        _sync_directory(path.parent)
    except OSError as problem:
        raise _cannot_write(path, problem, error) from problem
    finally:
        draft.unlink(missing_ok=True)


def replace_directory(
    path: Path,
    build: Callable[[Path], None],
    *,
    objection: Callable[[Path], str | None] = lambda path: None,
    error: type[SideroadError] = AdapterError,
) -> None:
    """Build a directory beside `path` and rename it there once it is complete and on the disk.

    Args:
        build: fills the directory it is given; whatever it raises leaves `path` as it was.
        objection: asked about a `path` that already holds something; a sentence refuses to replace it.
    Raises:
        SideroadError: of kind `error`; the objection, disk full, no permission. The old directory is then untouched.
    """
    path = Path(os.path.abspath(path))
    refuse_occupied_path(path, objection, error)
    draft = _sibling(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        build(draft)
        for file in sorted(draft.rglob("*")):
            _sync_directory(file) if file.is_dir() else _sync_file(file)
        _sync_directory(draft)
        _put_in_place(draft, path)
        _sync_directory(path.parent)
    except OSError as problem:
        raise _cannot_write(path, problem, error) from problem
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_occupied_path(
    path: Path, objection: Callable[[Path], str | None], error: type[SideroadError] = AdapterError
) -> None:
    """Raise what `replace_directory` would raise about what is at `path` now; for asking before long work.

    Raises:
        SideroadError: of kind `error`; there is a file or link, or a directory that `objection` keeps.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise error(f"{path} exists and is not a directory; nothing was written. Choose another path or remove it.")
    reason = objection(path) if path.is_dir() and any(path.iterdir()) else None
    if reason:
        raise error(f"{path} is not replaced: {reason} Choose another path, or remove the directory first.")


def _put_in_place(draft: Path, path: Path) -> None:
    if not path.exists():
        os.rename(draft, path)
    elif not _exchange(draft, path):
        old = _sibling(path, "old")
        os.rename(path, old)
        try:
            os.rename(draft, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(draft: Path, path: Path) -> bool:
    """Swap two directories in one step where the system can; the old one is then at `draft`."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(draft), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0)


def _sibling(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.{ending}")


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, problem: OSError, error: type[SideroadError]) -> SideroadError:
    fixes = {
        errno.ENOSPC: "Free some space or choose another disk.",
        errno.EDQUOT: "Your quota is used up; free some space.",
        errno.EFBIG: "The file would pass this system's limit on file sizes.",
        errno.EACCES: "Check the directory's permissions or choose another path.",
        errno.EPERM: "Check the directory's permissions or choose another path.",
        errno.EROFS: "Choose a path on a disk that can be written.",
    }
    fix = fixes.get(problem.errno or 0, "Choose another path or mend the cause.")
    return error(f"{path} cannot be written: {_reason(problem)}. What was there before is untouched. {fix}")


def _reason(problem: Exception) -> str:
    return problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"given twice: {', '.join(twice[:5])}")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
