"""Drafts: hidden directories beside their place, held while they are written, swept when their writer is gone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: drafts are then not held, and never swept
    fcntl = None  # type: ignore[assignment]

_STEM_BYTES = 200


def sibling(path: Path, ending: str) -> Path:
    """Return a new hidden name beside `path`, `.NAME.xxxxxxxx.ENDING`, short enough for a file system."""
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(4)}.{ending}")


@contextlib.contextmanager
def new_draft(path: Path) -> Iterator[Path]:
    """Make an empty directory beside `path`, held until the block ends and then removed, whatever is in it.

    The hold is a lock on the directory itself: it moves along when that is renamed, and ends with the process.

    Raises:
        OSError: as the system gives it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held, draft = False, path
    with contextlib.ExitStack() as stack:
        while not held:
            draft = sibling(path, "tmp")
            draft.mkdir()
            stack.callback(shutil.rmtree, draft, ignore_errors=True)
            try:
                # waits for a sweep that took the new directory for a dead writer's, and then makes another one
                held = stack.enter_context(_held(draft, wait=True))
            except FileNotFoundError:
                continue
            except OSError:
                break  # a file system without locks, where nothing is swept either
        yield draft


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """Keep sweeps away from a directory while it is moved, where the system has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_held(path, wait=False))
        yield


def sweep(path: Path) -> None:
    """Remove the drafts that killed processes left beside `path`; those that somebody still writes stay.

    What cannot be removed, and every file or link of such a name, is passed over in silence.
    """
    left = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{8}}\.(?:tmp|old)")
    with contextlib.suppress(OSError):
        for name in filter(left.fullmatch, os.listdir(path.parent)):
            draft = path.with_name(name)
            with contextlib.suppress(OSError), _held(draft, wait=False) as ours:
                if ours:
                    shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a directory for the block; yields whether the lock is had and the directory still has this name.

    Raises:
        OSError: it is gone or no directory, the file system has no locks, or (without `wait`) somebody else holds it.
    """
    if fcntl is None:
        raise OSError("no locks on this system")
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.path.samestat(os.fstat(handle), os.stat(directory, follow_symlinks=False))
    finally:
        os.close(handle)


def _stem(path: Path) -> str:
    """The name; of one that leaves no room for more, its beginning and a hash of all of it."""
    name = os.fsencode(path.name)
    if len(name) <= _STEM_BYTES:
        return path.name
    return f"{path.name[: _STEM_BYTES // 5]}-{hashlib.sha256(name).hexdigest()[:16]}"
