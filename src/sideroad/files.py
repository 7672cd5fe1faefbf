"""Files written whole or not at all, and JSON read strictly."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError

from sideroad.drafts import kept, new_draft, sibling, sweep
from sideroad.errors import AdapterError, SideroadError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""A value as JSON knows it."""

JSON_BYTES_ALLOWED = 64 * 1024 * 1024
NESTING_ALLOWED = 100
"""Lists and mappings inside each other that are read; Python's own limit depends on who calls."""

_HUB_SNAPSHOT = re.compile(r"(?P<repository>.*/(?:models|datasets|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")
_TOO_DEEP = f"nested too deeply (more than {NESTING_ALLOWED} levels)"
_NO_DIRECTORY = "A part of the path is a file, or symbolic links in a circle; choose another path."
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
    except (OSError, RuntimeError, ValueError) as problem:
        raise error(f"{shown_path(path)} cannot be read: {_reason(problem)}. Put a readable file there.") from problem
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
    except ValueError as problem:
        raise error(f"{path} is not valid JSON: {problem}. Fetch the file again or mend it.") from problem


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object strictly.

    Raises:
        ValueError: not JSON, not an object, a key given twice, a number JSON does not have, text that is not Unicode,
            or more than `NESTING_ALLOWED` levels.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as problem:
        raise ValueError(_TOO_DEEP) from problem
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{...}}, found {type(value).__name__}")
    _refuse_odd(value)
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
    draft = sibling(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(draft, content)
        os.replace(draft, path)
        _settle(path, error)
    except OSError as problem:
        raise cannot_write(path, problem, error) from problem
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

    Afterwards the drafts that killed processes left for the same `path` are removed.

    Args:
        build: fills the directory it is given; whatever it raises leaves `path` as it was.
        objection: asked about a `path` that already holds something; a sentence refuses to replace it.
    Raises:
        SideroadError: of kind `error`; the objection, disk full, no permission. The old directory is then untouched.
    """
    refuse_occupied_path(path, objection, error)
    path = Path(os.path.abspath(path))
    try:
        with new_draft(path) as draft:
            with system_errors():
                build(draft)
            for file in sorted(draft.rglob("*")):
                _sync_directory(file) if file.is_dir() else _sync_file(file)
            _sync_directory(draft)
            _put_in_place(draft, path)
        _settle(path, error)
    except OSError as problem:
        raise cannot_write(path, problem, error) from problem
    sweep(path)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise as OSError what safetensors says about a full disk, a limit or a permission in an error of its own."""
    try:
        yield
    except SafetensorError as problem:
        number = re.search(r"os error (\d+)", str(problem))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from problem


def refuse_occupied_path(
    path: Path, objection: Callable[[Path], str | None], error: type[SideroadError] = AdapterError
) -> None:
    """Raise what `replace_directory` would raise about what is at `path` now; for asking before long work.

    Raises:
        SideroadError: of kind `error`; there is a file or link, or a directory that `objection` keeps.
    """
    refuse_odd_path(path, error)
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise error(f"{path} exists and is not a directory; nothing was written. Choose another path or remove it.")
        reason = objection(path) if path.is_dir() and any(path.iterdir()) else None
    except OSError as problem:
        raise cannot_write(path, problem, error) from problem
    if reason:
        raise error(f"{path} is not replaced: {reason} Choose another path, or remove the directory first.")


def refuse_odd_path(path: Path, error: type[SideroadError] = AdapterError) -> None:
    """Raise an error of kind `error` for a path that no file can have: a null character, half a surrogate pair."""
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise error(f"the path {shown_path(path)} has a character that no file's name can have; choose another path.")


def shown_path(path: Path) -> str:
    """Return a path as it can be printed everywhere, shortened."""
    text = str(path)
    text = text if text.isprintable() and _encodable(text) else ascii(text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _put_in_place(draft: Path, path: Path) -> None:
    if not path.exists():
        os.rename(draft, path)
    elif not _exchange(draft, path):
        old = sibling(path, "old")
        with kept(path):
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


def _settle(path: Path, error: type[SideroadError]) -> None:
    try:
        _sync_directory(path.parent)
    except OSError as problem:
        raise error(
            f"{path} is written and in its place, but the system cannot say that it is on the disk: "
            f"{_reason(problem)}. Check the disk and write it again."
        ) from problem


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


def cannot_write(path: Path, problem: OSError, error: type[SideroadError] = AdapterError) -> SideroadError:
    """Return an error of kind `error` that says why the system would not write to `path`, and what helps."""
    fixes = {
        errno.ENOSPC: "Free some space or choose another disk.",
        errno.EDQUOT: "Your quota is used up; free some space.",
        errno.EFBIG: "The file would pass this system's limit on file sizes.",
        errno.EACCES: "Check the directory's permissions or choose another path.",
        errno.EPERM: "Check the directory's permissions or choose another path.",
        errno.EEXIST: _NO_DIRECTORY,
        errno.ENOTDIR: _NO_DIRECTORY,
        errno.ELOOP: _NO_DIRECTORY,
        errno.EROFS: "Choose a path on a disk that can be written.",
    }
    fix = fixes.get(problem.errno or 0, "Choose another path or mend the cause.")
    return error(f"{shown_path(path)} cannot be written: {_reason(problem)}. What was there before is untouched. {fix}")


def _reason(problem: Exception) -> str:
    return problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)


def _refuse_odd(value: Any) -> None:
    level = [value]
    for _ in range(NESTING_ALLOWED + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following += item
                following += item.values()
            elif isinstance(item, list):
                following += item
            elif isinstance(item, str) and not item.isascii() and not _encodable(item):
                raise ValueError(f"{item[:40]!a} holds half of a surrogate pair, which is no text")
        if not following:
            return
        level = following
    raise ValueError(_TOO_DEEP)


def _encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"given twice: {', '.join(name[:80] for name in twice[:5])}")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
