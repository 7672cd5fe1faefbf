"""Safetensors files: every size and offset is checked before it is used, and every write is read back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from sideroad.errors import AdapterError, SideroadError, raise_findings
from sideroad.files import parse_object, read_json, regular_file, write_bytes

HEADER_BYTES_ALLOWED = 100_000_000
"""The format's own limit."""

NAME_ALLOWED = 1000
"""Characters that a tensor's name may have."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""The format's names of the types that are read."""

_FOREIGN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull` or download it again",
    b"PK\x03\x04": "a zip archive, as torch.save writes (a pickle); convert it, it is never opened here",
    b"\x80\x02": "a Python pickle; convert it, it is never opened here",
    b"GGUF": "a GGUF file",
    b"<!DOCTYPE": "a web page; the download went wrong",
    b"<html": "a web page; the download went wrong",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a file's header states it; `start` and `end` are byte offsets into the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, error: type[SideroadError] = AdapterError) -> dict[str, TensorEntry]:
    """Read and check a safetensors header without touching the data.

    Raises:
        SideroadError: of kind `error`; truncated, not safetensors, or a header whose sizes and offsets do not fit
            the file, all findings at once.
    """
    real = regular_file(path, error)
    try:
        with open(real, "rb") as file:
            return _header(file, path, error)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}.") from problem


def read_tensors(path: Path, error: type[SideroadError] = AdapterError) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file to the CPU, in its stored type.

    Raises:
        SideroadError: of kind `error`; see `read_header`.
    """
    real = regular_file(path, error)
    try:
        with open(real, "rb") as file:
            return {name: _tensor(file, entry) for name, entry in _header(file, path, error).items()}
    except (OSError, EOFError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be read: {reason}. Fetch it again.") from problem
    except MemoryError as problem:
        size = real.stat().st_size
        raise error(f"{path} holds {size} bytes, more than this machine's memory has room for.") from problem


def read_sharded(index: Path, error: type[SideroadError] = AdapterError) -> dict[str, Tensor]:
    """Read the tensors of all files that a `*.safetensors.index.json` names.

    Raises:
        SideroadError: of kind `error`; a shard that is missing, broken or outside the directory, a tensor that is
            listed but absent or present but not listed; all findings at once.
    """
    listed = read_json(index, error).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise error(f'{index} has no "weight_map" of tensor names to file names. Fetch it again.')
    findings: list[str] = []
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(listed.values())):
        if shard in ("", ".", "..") or "\\" in shard or "\0" in shard or PurePosixPath(shard).name != shard:
            findings.append(f'{index} names the shard "{shard[:80]}"; only a plain file name beside the index is read')
            continue
        try:
            found = read_tensors(index.parent / shard, error)
        except SideroadError as problem:
            findings.append(str(problem))
            continue
        expected = {name for name, file in listed.items() if file == shard}
        findings += [f"{shard} lacks {name}, which {index.name} places there" for name in sorted(expected - set(found))]
        strays = sorted(set(found) - expected)
        findings += [f"{shard} holds {name}, which {index.name} does not place there" for name in strays]
        tensors.update(found)
    raise_findings(error, str(index), shorten(findings))
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], error: type[SideroadError] = AdapterError) -> None:
    """Write a new safetensors file, wait for the disk, read it back and compare it bit for bit.

    Raises:
        SideroadError: of kind `error`; a tensor without elements or of a type the format lacks, or a file that reads
            back differently.
        OSError: as the system gives it.
    """
    known = set(DTYPES.values())
    findings = [f"tensor {name} is empty; nothing would be stored" for name, t in tensors.items() if not t.numel()]
    findings += [f"tensor {name} has type {t.dtype}" for name, t in tensors.items() if t.dtype not in known]
    raise_findings(error, f"{path.name} is not written", findings)
    plain = {name: _owned(tensor) for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata={"format": "pt"}))
    again = read_tensors(path, error)
    differing = sorted(set(plain) ^ set(again)) or [n for n in plain if not same_bits(plain[n], again[n])]
    if differing:
        raise error(f"{path} reads back differently ({', '.join(differing[:3])}); the disk or memory is not reliable.")


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Say whether two tensors have the same type, shape and bytes; NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def shorten(findings: list[str], shown: int = 20) -> list[str]:
    """Keep the first findings, none longer than a screen, and count the rest, so that a message stays readable."""
    left = len(findings) - shown
    kept = [finding if len(finding) <= 2000 else f"{finding[:1997]}..." for finding in findings[:shown]]
    return kept if left <= 0 else [*kept, f"and {left} more of this kind"]


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _header(file: BinaryIO, path: Path, error: type[SideroadError]) -> dict[str, TensorEntry]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    for mark, what in _FOREIGN_STARTS.items():
        # the header's length may begin with the bytes of a mark: 640 with those of a pickle
        if start.startswith(mark) and start[8:9] != b"{":
            raise error(f"{path} is not a safetensors file but {what}.")
    if len(start) < 8:
        raise error(f"{path} holds {size} bytes, too few for a safetensors file. It is truncated; fetch it again.")
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_BYTES_ALLOWED or length < 2:
        raise error(f"{path} is not a safetensors file: its first 8 bytes give a header of {length} bytes.")
    if 8 + length > size:
        raise error(
            f"{path} holds {size} bytes but its header alone needs {8 + length}. It is truncated or not a safetensors "
            "file; fetch it again."
        )
    file.seek(8)
    try:
        listed = parse_object(file.read(length).decode("utf-8"))
    except ValueError as problem:
        raise error(f"{path} has a broken safetensors header: {problem}. Fetch it again.") from problem
    metadata = listed.pop("__metadata__", {})
    findings: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        findings.append("__metadata__ is not a mapping of strings")
    entries: dict[str, TensorEntry] = {}
    for name, item in listed.items():
        entry = _entry(item, 8 + length) if len(name) <= NAME_ALLOWED else f"its name has {len(name)} characters"
        if isinstance(entry, str):
            findings.append(f"tensor {name[:120]}: {entry}")
        else:
            entries[name] = entry
    if not findings:
        findings += _layout(entries, 8 + length, size)
    raise_findings(error, f"{path} has a broken safetensors header", [f"{f} ({path.name})" for f in shorten(findings)])
    return entries


def _entry(item: Any, base: int) -> TensorEntry | str:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        return "its entry does not hold exactly dtype, shape and data_offsets"
    dtype = DTYPES.get(item["dtype"]) if isinstance(item["dtype"], str) else None
    if dtype is None:
        return f"type {str(item['dtype'])[:40]!r} is not one of {', '.join(DTYPES)}"
    shape, offsets = item["shape"], item["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "its shape or data_offsets are not lists of counts"
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        return f"shape {shape} needs {needed} bytes but its offsets span {offsets[1] - offsets[0]}"
    return TensorEntry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value) and len(value) <= 16


def _layout(entries: Mapping[str, TensorEntry], base: int, size: int) -> list[str]:
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves unclaimed bytes before it"
            return [f"tensor {name[:120]} {kind}"]
        position = entry.end
    if position > size:
        return [f"the tensors need {position} bytes but the file holds {size}; it is truncated, fetch it again"]
    if position < size:
        return [f"{size - position} bytes follow the last tensor; the file is not what its header says"]
    return []


def _tensor(file: BinaryIO, entry: TensorEntry) -> Tensor:
    length = entry.end - entry.start
    if not length:
        return torch.empty(entry.shape, dtype=entry.dtype)
    content = bytearray(length)
    file.seek(entry.start)
    if file.readinto(content) != length:  # type: ignore[attr-defined]
        raise EOFError("the file became shorter while it was read")
    return torch.frombuffer(content, dtype=entry.dtype).reshape(entry.shape)
