"""Files that are something else, or lie elsewhere: told by name, never opened or unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from amounts import AMOUNTS, run
from damaged import CONFIG, GOOD, INDEX, MANIFEST, SHARDS, WEIGHTS, header_end, load_with, raw, with_header
from hypothesis import given
from hypothesis import strategies as st

from sideroad.adapter import Adapter
from sideroad.errors import SideroadError

pytestmark = pytest.mark.usefixtures("no_pickles")

REPLACED: dict[str, Callable[[bytes], bytes]] = {
    "length 2**63": lambda good: struct.pack("<Q", 2**63) + good[8:],
    "length 2**64 - 1": lambda good: struct.pack("<Q", 2**64 - 1) + good[8:],
    "length 99999999": lambda good: struct.pack("<Q", 99_999_999) + good[8:],
    "length 0": lambda good: struct.pack("<Q", 0) + good[8:],
    "a name twice": lambda good: with_text(good, lambda text: text.rstrip()[:-1] + b"," + text.lstrip()[1:]),
    "a key twice": lambda good: with_text(good, lambda text: text.replace(b'"F32"', b'"F32","dtype":"F32"', 1)),
    "surrogate": lambda good: with_header(good, lambda h: h | {"\ud800": next(iter(h.values()))}),
    "pickle": lambda good: pickle.dumps({"a": [1.0] * 100}),
    "torch.save": lambda good: saved_by_torch(),
    "empty": lambda good: b"",
    "zeros": lambda good: bytes(len(good)),
    "twice": lambda good: good + good,
    "only numbers": lambda good: good[header_end(good) :],
    "gguf": lambda good: b"GGUF" + good,
    "web page": lambda good: b"<!DOCTYPE html>" + good,
}  # fmt: skip


JSON_TOO = ("pickle", "torch.save", "empty", "zeros", "twice", "gguf", "web page")


def with_text(good: bytes, change: Callable[[bytes], bytes]) -> bytes:
    return raw(change(good[8 : header_end(good)]), good[header_end(good) :])


def saved_by_torch() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(9)}, file)
    return file.getvalue()


@pytest.mark.parametrize("case", REPLACED)
def test_files_that_are_something_else(single: Path, sharded: Path, case: str) -> None:
    json_too = ((single, CONFIG), (single, MANIFEST), (sharded, INDEX)) if case in JSON_TOO else ()
    for home, name in ((single, WEIGHTS), (sharded, SHARDS[0]), *json_too):
        found = load_with(home, {name: REPLACED[case]((home / name).read_bytes())})
        assert isinstance(found, str)
        assert name in found


def test_a_pickle_beside_or_instead_is_never_opened(single: Path, tmp_path: Path) -> None:
    good = (single / WEIGHTS).read_bytes()
    found = load_with(single, {"adapter_model.bin": pickle.dumps(print)})
    assert isinstance(found, Adapter)
    home = tmp_path / "a"
    GOOD.save(home)
    (home / WEIGHTS).rename(home / "adapter_model.bin")
    with pytest.raises(SideroadError, match="a pickle, which can run code when it is opened; it is not read"):
        Adapter.load(home)
    assert (home / "adapter_model.bin").read_bytes() == good


@AMOUNTS
def test_random_bytes(single: Path, sharded: Path, amount: int) -> None:
    @given(data=st.data(), content=st.binary(max_size=200))
    def check(data: st.DataObject, content: bytes) -> None:
        home = data.draw(st.sampled_from([single, sharded]))
        name = data.draw(st.sampled_from(sorted(os.listdir(home))))
        if data.draw(st.booleans()):
            content = raw(content)
        found = load_with(home, {name: content})
        assert isinstance(found, str) or (name == MANIFEST and content.strip() == b"{}")

    run(check, 150, amount)


SECRET = "secret"
elsewhere = st.sampled_from([
    "../secret", "../../secret", "/etc/passwd", "./x", "sub/x", "a/../../secret", "..", ".", "", "\0", "a\\b", "\ud800",
    "~/x", "x" * 300, "x" * 5000, CONFIG, INDEX, "adapter_config.json/x", "%2e%2e/secret", "link",
]) | st.text(max_size=12)  # fmt: skip


@AMOUNTS
def test_shards_elsewhere_are_never_opened(sharded: Path, tmp_path: Path, amount: int) -> None:
    home = tmp_path / "deep/adapter"
    shutil.copytree(sharded, home)
    index = json.loads((home / INDEX).read_text())
    for place in (home.parent / SECRET, home.parent.parent / SECRET):
        place.write_bytes((home / SHARDS[0]).read_bytes())

    @given(data=st.data(), shard=elsewhere)
    def check(data: st.DataObject, shard: str) -> None:
        moved = data.draw(st.sets(st.sampled_from(sorted(index["weight_map"])), min_size=1))
        places = {name: shard if name in moved else place for name, place in index["weight_map"].items()}
        (home / "link").unlink(missing_ok=True)
        (home / "link").symlink_to("../secret")
        found = load_with(home, {INDEX: json.dumps({"weight_map": places}).encode()})
        assert isinstance(found, str)

    run(check, 100, amount)
