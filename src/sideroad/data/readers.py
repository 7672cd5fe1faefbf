"""One reader per file kind: bytes in, rows with their line out; problems are collected, not raised."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
SUFFIXES = tuple(_KINDS)
"""File name endings that can be read."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file.

    Attributes:
        values: column → value.
        source: short name for records, such as `train.jsonl:7`.
        place: the same for messages, such as `train.jsonl line 7`.
    """

    values: Mapping[str, Any]
    source: str
    place: str


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name (`.gz` looked through), or None where no reader fits."""
    path = Path(name)
    if path.suffix == ".gz":
        path = path.with_suffix("")
        return None if path.suffix == ".parquet" else _KINDS.get(path.suffix.lower())
    return _KINDS.get(path.suffix.lower())


def read_rows(name: str, data: bytes, path: Path, problems: list[str]) -> list[Row]:
    """Read every row of one file.

    Args:
        data: its bytes, already unpacked.
        path: where it lies; only Parquet reads it again from there.
        problems: receives one complete message per thing that is wrong.
    """
    kind = kind_of(name)
    if kind is None:
        problems.append(f"{name}: unknown kind of file. Readable: {', '.join(SUFFIXES)}; all but .parquet also .gz")
        return []
    if kind == "parquet":
        return _read_parquet(name, path, problems)
    if not data.strip():
        problems.append(f"{name} is empty")
        return []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(f"{name} line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8")
        return []
    return list(_TEXT_READERS[kind](name, text, problems))


def _read_jsonl(name: str, text: str, problems: list[str]) -> Iterator[Row]:
    # split("\n"), not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{name} line {number}: not JSON: {error}; found {line.strip()[:60]!r}")
            continue
        yield from _row(value, name, number, "line", problems)


def _read_json(name: str, text: str, problems: list[str]) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_object(text.lstrip().split("\n", 1)[0]):
            yield from _read_jsonl(name, text, problems)
            return
        problems.append(f"{name} line {error.lineno}: not JSON: {error.msg} (column {error.colno})")
        return
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}: not JSON: {error}")
        return
    if isinstance(value, dict) and len(lists := [item for item in value.values() if isinstance(item, list)]) == 1:
        value = lists[0] if len(value) == 1 else [value]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        problems.append(f"{name}: must be a list of objects; found {type(value).__name__}")
        return
    for number, item in enumerate(value, 1):
        yield from _row(item, name, number, "item", problems)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _row(value: object, name: str, number: int, unit: str, problems: list[str]) -> Iterator[Row]:
    if isinstance(value, dict) and value:
        yield Row(value, f"{name}:{number}", f"{name} {unit} {number}")
    else:
        problems.append(f"{name} {unit} {number}: must be an object with columns; found {str(value)[:40]!r}")


def _read_csv(name: str, text: str, problems: list[str], delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header) or not all(header):
                    problems.append(f"{name} line 1: column names must be there and differ; found {', '.join(header)}")
                    return
            elif cells and len(cells) != len(header):
                problems.append(f"{name} line {line}: {len(cells)} cells, but the header names {len(header)} columns")
            elif cells:
                yield Row(dict(zip(header, cells, strict=True)), f"{name}:{line}", f"{name} line {line}")
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append(f"{name} line {line}: not valid CSV: {error}")


def _read_tsv(name: str, text: str, problems: list[str]) -> Iterator[Row]:
    return _read_csv(name, text, problems, delimiter="\t")


def _read_txt(name: str, text: str, problems: list[str]) -> Iterator[Row]:
    yield Row({"text": text}, f"{name}:1", name)


def _read_parquet(name: str, path: Path, problems: list[str]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        problems.append(f"{name}: not a readable Parquet file: {error}")
        return []
    return [Row(item, f"{name}:{number}", f"{name} row {number}") for number, item in enumerate(values, 1)]


_TEXT_READERS: dict[str, Callable[[str, str, list[str]], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "txt": _read_txt,
}
