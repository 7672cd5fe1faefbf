"""Safetensors reading and writing: nothing in a file is believed before it is checked."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sideroad.errors import AdapterError, BaseModelError
from sideroad.tensor_files import read_header, read_sharded, read_tensors, same_bits, write_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.linspace(-1, 1, 5).bfloat16(),
    "c": torch.tensor([float("nan"), -0.0], dtype=torch.float16),
}
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_type_survives_both_ways(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours.safetensors", TENSORS)
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    theirs, ours = load_file(tmp_path / "ours.safetensors"), read_tensors(tmp_path / "theirs.safetensors")
    for name, tensor in TENSORS.items():
        assert same_bits(tensor, theirs[name]), name
        assert same_bits(tensor, ours[name]), name
    assert read_header(tmp_path / "ours.safetensors")["a"].shape == (3, 4)


def test_same_bits_tells_type_shape_and_sign() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))


def test_views_and_shared_storage_are_written_as_values(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"t": whole.t(), "same": whole})
    assert torch.equal(read_tensors(tmp_path / "t.safetensors")["t"], whole.t())


def test_empty_tensor_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="tensor x is empty; nothing would be stored"):
        write_tensors(tmp_path / "t.safetensors", {"x": torch.empty(0, 4)})
    assert not (tmp_path / "t.safetensors").exists()


BROKEN = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "tensor b overlaps the tensor before it"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "tensor b leaves unclaimed bytes"),
    "beyond": ({"a": entry(offsets=(0, 8))}, bytes(4), "the tensors need .* it is truncated"),
    "tail": ({"a": entry()}, bytes(9), "1 bytes follow the last tensor"),
    "size": ({"a": entry(shape=(3,))}, bytes(8), r"shape \[3\] needs 12 bytes but its offsets span 8"),
    "slack": ({"a": entry(shape=(1,))}, bytes(8), r"shape \[1\] needs 4 bytes but its offsets span 8"),
    "absurd": ({"a": entry(shape=(2**62, 2**62))}, bytes(8), "needs .* bytes but its offsets span 8"),
    "negative": ({"a": entry(shape=(-2,))}, bytes(8), "not lists of counts"),
    "boolean": ({"a": entry(shape=(True, 2))}, bytes(8), "not lists of counts"),
    "backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), "not lists of counts"),
    "type": ({"a": entry(dtype="F33")}, bytes(8), "type 'F33' is not one of F64"),
    "keys": ({"a": {"dtype": "F32"}}, b"", "does not hold exactly dtype, shape and data_offsets"),
    "list": ([1], b"", r"expected an object \{...\}, found list"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not a mapping of strings"),
    "constant": (b'{"a": NaN}', b"", "NaN is not a JSON number"),
    "twice": (b'{"a": 1, "a": 2}', b"", "given twice: a"),
    "deep": (b"[" * 100_000, b"", "broken safetensors header"),
    "not text": (b"\xff\xfe{}", b"", "broken safetensors header"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_named(tmp_path: Path, case: str) -> None:
    header, data, words = BROKEN[case]
    path = raw_file(tmp_path / "t.safetensors", header, data)
    with pytest.raises(AdapterError, match=words) as caught:
        read_tensors(path)
    assert "t.safetensors" in str(caught.value)


def test_all_broken_entries_are_listed(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "t.safetensors", {"a": entry(dtype="?"), "b": entry(shape=(9,))})
    with pytest.raises(AdapterError, match="2 problems") as caught:
        read_header(path)
    assert "tensor a" in str(caught.value)
    assert "tensor b" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds 0 bytes, too few"),
        (b"\x01\0\0", "too few for a safetensors file. It is truncated"),
        (struct.pack("<Q", 2**63), "give a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 5000) + b"{}", "its header alone needs 5008. It is truncated"),
        (b"PK\x03\x04" + bytes(40), "a zip archive, as torch.save writes"),
        (b"\x80\x02}q" + bytes(40), "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page; the download went wrong"),
    ],
)
def test_foreign_files_are_recognised(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        read_tensors(tmp_path / "t.safetensors")


def test_a_header_as_long_as_a_pickles_first_bytes_say_is_read(tmp_path: Path) -> None:
    seen = set()
    for count in range(540, 580):
        path = tmp_path / f"{count}.safetensors"
        write_tensors(path, {"n" * count: torch.ones(2)})
        seen.add(path.read_bytes()[:2])
        assert torch.equal(read_tensors(path)["n" * count], torch.ones(2))
    assert b"\x80\x02" in seen


def test_missing_file_and_error_kind(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="No such file"):
        read_tensors(tmp_path / "none.safetensors", BaseModelError)


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="not an ordinary file"):
        read_tensors(tmp_path / "pipe")


def test_link_out_of_the_directory_is_refused_but_not_a_hub_cache(tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    write_tensors(outside, TENSORS)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/t.safetensors").symlink_to(outside)
    with pytest.raises(AdapterError, match=r"symbolic link to .* outside its directory"):
        read_tensors(tmp_path / "adapter/t.safetensors")
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/rev/sub").mkdir(parents=True)
    write_tensors(repository / "blobs/0123", TENSORS)
    link = repository / "snapshots/rev/sub/t.safetensors"
    link.symlink_to("../../../blobs/0123")
    assert set(read_tensors(link)) == set(TENSORS)
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(AdapterError, match="outside its directory"):
        read_tensors(link)


def shards(directory: Path, weight_map: dict[str, str]) -> Path:
    index = directory / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_are_joined(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1.safetensors", {"a": TENSORS["a"]})
    write_tensors(tmp_path / "2.safetensors", {"b": TENSORS["b"]})
    found = read_sharded(shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert torch.equal(found["a"], TENSORS["a"])
    assert torch.equal(found["b"], TENSORS["b"])


@pytest.mark.parametrize("name", ["../1.safetensors", "/etc/passwd", "a/../1.safetensors", "..", "a\\b", ""])
def test_shards_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    write_tensors(tmp_path / "1.safetensors", {"a": TENSORS["a"]})
    with pytest.raises(AdapterError, match="only a plain file name beside the index is read"):
        read_sharded(shards(tmp_path / "in", {"a": name}))


def test_all_faults_of_shards_come_at_once(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1.safetensors", {"a": TENSORS["a"], "extra": TENSORS["b"]})
    index = shards(tmp_path, {"a": "1.safetensors", "lost": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(AdapterError, match="3 problems") as caught:
        read_sharded(index)
    for words in ("lacks lost", "holds extra", "2.safetensors cannot be read"):
        assert words in str(caught.value)


def test_index_without_a_map(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(AdapterError, match='has no "weight_map"'):
        read_sharded(tmp_path / "i.json")


def attempt(path: Path, content: bytes) -> dict[str, torch.Tensor] | None:
    path.write_bytes(content)
    try:
        return read_tensors(path)
    except AdapterError:
        return None


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "t.safetensors"
    write_tensors(path, TENSORS)
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_any_truncation_is_refused(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(good) - 1))
    assert attempt(tmp_path / "t.safetensors", good[:kept]) is None


@FUZZ
@given(data=st.data())
def test_flipped_header_bits_are_refused_or_change_names_and_types_only(
    tmp_path: Path, good: bytes, data: st.DataObject
) -> None:
    header = 8 + int.from_bytes(good[:8], "little")
    flipped = bytearray(good)
    for bit in data.draw(st.lists(st.integers(0, header * 8 - 1), min_size=1, max_size=3, unique=True)):
        flipped[bit // 8] ^= 1 << bit % 8
    found = attempt(tmp_path / "t.safetensors", bytes(flipped))
    if found is not None:
        assert len(found) == len(TENSORS)
        assert sum(t.numel() * t.itemsize for t in found.values()) == len(good) - header


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes_never_crash(tmp_path: Path, content: bytes) -> None:
    attempt(tmp_path / "t.safetensors", content)


@FUZZ
@given(
    header=st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", 3, None, ["F32"]]),
                "shape": st.lists(st.integers(-1, 2**70) | st.booleans() | st.none(), max_size=4),
                "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3),
            }
        ),
        max_size=3,
    ),
    data=st.binary(max_size=64),
)
def test_absurd_headers_never_crash_nor_invent_data(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = raw_file(tmp_path / "t.safetensors", header, data)
    found = attempt(path, path.read_bytes())
    if found is not None:
        assert sum(t.numel() * t.itemsize for t in found.values()) == len(data)
