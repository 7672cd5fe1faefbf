"""From a path or a hub id to rows that know their file and line."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from sideroad.base.fetch import is_offline
from sideroad.data.readers import SUFFIXES, Row, kind_of, read_rows
from sideroad.errors import DataError

Split = Literal["train", "validation"]

_SPLIT_WORDS = {
    "train": re.compile(r"(^|[^a-z])train", re.I),
    "validation": re.compile(r"(^|[^a-z])(validation|valid|val|dev|eval)([^a-z]|$)", re.I),
    "test": re.compile(r"(^|[^a-z])test([^a-z]|$)", re.I),
}
_HUB = re.compile(r"^(?:hub:)?(?P<id>[\w.-]+/[\w.-]+|[\w.-]+)(?::(?:(?P<config>[^/:]+)/)?(?P<split>[^/:]+))?$")


@dataclass(frozen=True)
class Source:
    """The rows of one recipe entry, with what identifies them.

    Attributes:
        rows: every row, in file order.
        files: name of each file (or hub set) as shown to the user → sha256 of its bytes (of its rows for a hub set).
    """

    rows: tuple[Row, ...]
    files: Mapping[str, str]


def read_source(source: str, *, root: Path, split: Split, offline: bool = False) -> Source:
    """Read one source completely.

    Args:
        source: file, directory or hub set (the syntax is in `DataConfig`).
        root: where relative paths start.
        split: which files of a directory, and which split of a hub set, are meant.
        offline: take a hub set only from the local cache; SIDEROAD_OFFLINE does the same.
    Raises:
        DataError: missing (with near names), empty, or unreadable, with file and line; up to 20 lines at once.
    """
    path = (root / os.path.expanduser(source)) if not source.startswith("hub:") else None
    if path is not None and os.path.isfile(path):
        return _read_files([path], named=path.name)
    if path is not None and os.path.isdir(path):
        return _read_files(_files_of(path, split), named=f"{source} ({split})")
    if path is None or _may_be_hub(source, root):
        return _read_hub(source, split, is_offline(offline))
    raise DataError(_missing(source, path))


def _read_files(paths: Iterable[Path], named: str) -> Source:
    rows: list[Row] = []
    files: dict[str, str] = {}
    problems: list[str] = []
    for path in paths:
        try:
            data = path.read_bytes()
            files[path.name] = hashlib.sha256(data).hexdigest()
            rows.extend(read_rows(path.name, gzip.decompress(data) if path.suffix == ".gz" else data, path, problems))
        except (OSError, EOFError, zlib.error) as error:
            problems.append(f"{path}: cannot be read: {error}")
    if problems:
        raise DataError(_listed(named, problems))
    if not rows:
        raise DataError(f"{named} holds no rows; it is empty")
    return Source(tuple(rows), files)


def _listed(named: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = "\n".join(f"  - {problem}" for problem in problems[:20])
    rest = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
    return f"{named}: {len(problems)} problems.\n{shown}{rest}"


def _files_of(directory: Path, split: Split) -> list[Path]:
    found = sorted(item for item in directory.iterdir() if item.is_file() and not item.name.startswith("."))
    data = [item for item in found if kind_of(item.name)]
    # LICENSE.txt and its like stand beside structured data; text files count only where nothing else is there.
    structured = [item for item in data if kind_of(item.name) != "txt"] or data
    own = [item for item in structured if _SPLIT_WORDS[split].search(item.name)]
    unnamed = [item for item in structured if not any(word.search(item.name) for word in _SPLIT_WORDS.values())]
    if chosen := own or unnamed:
        return chosen
    names = ", ".join(item.name for item in found[:20]) or "nothing"
    raise DataError(f"{directory} has no {split} files. It holds: {names}. Readable: {', '.join(SUFFIXES)}; "
                    "name one file.")


def _may_be_hub(source: str, root: Path) -> bool:
    match = _HUB.match(source)
    if match is None or "/" not in match["id"] or kind_of(source):
        return False
    return not (root / source.split("/")[0]).is_dir()


def _missing(source: str, path: Path) -> str:
    if os.path.lexists(path):
        return f'no data at "{source}": it is a broken link, a pipe or a device. Give a file or a directory.'
    parent = path.parent
    while not os.path.isdir(parent):
        parent = parent.parent
    names = sorted(item.name for item in parent.iterdir())
    wanted = path.relative_to(parent).parts[0] if path.is_relative_to(parent) else path.name
    near = get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f' Did you mean {" or ".join(repr(name) for name in near)}?' if near else ""
    listed = f" It holds: {', '.join(names[:12])}{' …' if len(names) > 12 else ''}." if names and not near else ""
    return (f'no data at "{source}": there is no "{wanted}" in {parent.resolve()}.{hint}{listed} '
            "Relative paths start at the recipe file, those on the command line where you are.")


def _read_hub(source: str, split: Split, offline: bool) -> Source:
    match = _HUB.match(source)
    if match is None:
        raise DataError(f'"{source}" is no hub set. Write owner/name, owner/name:split or owner/name:config/split.')
    import datasets

    wanted = match["split"] or split
    try:
        with _network(off=offline):
            table = datasets.load_dataset(
                match["id"], match["config"], split=wanted,
                download_config=datasets.DownloadConfig(local_files_only=offline),
            )
    except Exception as error:  # the library raises whatever its many backends raise
        raise DataError(
            f'"{source}" is no file or directory here, and as a hub set (split "{wanted}") it could not be read'
            f"{' offline' if offline else ''}: {type(error).__name__}: {error}. "
            "Check the name and the connection, or download the set and give its path."
        ) from error
    digest = hashlib.sha256()
    rows = []
    for number, values in enumerate(table, 1):
        digest.update(repr(sorted(values.items())).encode())
        rows.append(Row(dict(values), f"{match['id']}:{number}", f"{match['id']} row {number}"))
    if not rows:
        raise DataError(f'hub set "{source}" has no rows in split "{wanted}"')
    return Source(tuple(rows), {f"{match['id']}:{wanted}": digest.hexdigest()})


@contextmanager
def _network(*, off: bool) -> Iterator[None]:
    """Within the block and with `off`, the hub's libraries send nothing: `local_files_only` still asks who is there."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if off:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
