"""Adapter directories to be damaged, and what may come of it: an error that helps, or the right tensors."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sideroad.adapter import Adapter, BaseRecord
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import SideroadError

CONFIG, WEIGHTS, INDEX, MANIFEST = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json", "sideroad.json",
)  # fmt: skip
SHARDS = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")
ROOT = "base_model.model."
LONGEST = 20_000
"""Characters of the longest error: a screen or two of findings, never the file itself."""


def pair(rank: int, width: int, out: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"A": torch.randn(rank, width, generator=draw), "B": torch.randn(out, rank, generator=draw)}


GOOD = Adapter(
    AdapterConfig(
        targets=("q_proj", "v_proj"), exclude=("lm_*",), method=LoraMethod(rank=2, alpha=3), rank_pattern={"v_proj": 1}
    ),
    {
        "m.layers.0.q_proj": pair(2, 4, 6, 0),
        "m.layers.0.v_proj": pair(1, 4, 3, 1),
        "m.layers.1.q_proj": pair(2, 4, 6, 2),
    },
    BaseRecord("tiny", "here", "ab", "MIT"),
    manifest={"prompt": "be kind", "scores": [1.5, None]},
)


def numbers_of(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


RICH = Adapter(
    AdapterConfig(
        targets=("q", "qkv", "conv", "conv1", "grouped", "tok"), method=LoraMethod(rank=2), bias="adapted",
        slices={"qkv": (True, False, True)}, modules_to_save=("score",), trainable_tokens={"embed": (1, 5)},
    ),
    {
        "m.conv": {"A": numbers_of(2, 3, 3, 3), "B": numbers_of(4, 2, 1, 1)},
        "m.conv1": {"A": numbers_of(2, 3, 3), "B": numbers_of(4, 2, 1)},
        "m.embed": {"rows": numbers_of(2, 4)},
        "m.grouped": {"A": numbers_of(4, 2, 3, 3), "B": numbers_of(4, 2, 1, 1)},
        "m.q": {"A": numbers_of(2, 4), "B": numbers_of(3, 2), "bias": numbers_of(3)},
        "m.qkv": {"A": numbers_of(4, 4), "B": numbers_of(4, 2)},
        "m.tok": {"A": numbers_of(2, 9), "B": numbers_of(4, 2)},
    },
    modules={"m.score": {"weight": numbers_of(3, 4), "bias": numbers_of(3)}},
    kinds={"m.tok": "embedding"},
)  # fmt: skip
"""Everything else that a file can hold: convolutions, groups, slices, an embedding, rows, a bias, a whole module."""

EXPECTED: dict[Path, Adapter] = {}
"""Directory → what was saved there."""


_watched: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(args[0], str | bytes):
        _watched.append(os.path.realpath(os.fsdecode(args[0])))


sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Collect the real path of every file that is opened inside."""
    global _watched
    _watched = paths = []
    try:
        yield paths
    finally:
        _watched = None


Damage = dict[str, bytes]
"""File name → what it holds instead."""


def load_with(home: Path, damage: Damage) -> Adapter | str:
    """Load a directory while files hold something else; returns the adapter or the words of the error."""
    before = {name: (home / name).read_bytes() for name in damage if (home / name).exists()}
    for name, content in damage.items():
        (home / name).write_bytes(content)
    try:
        with opened() as paths:
            found: Adapter | str = Adapter.load(home)
    except SideroadError as problem:
        found = str(problem)
        assert 20 < len(found) < LONGEST
        assert found.encode().decode() == found
    finally:
        for name in damage:
            if name in before:
                (home / name).write_bytes(before[name])
            else:
                (home / name).unlink()
    outside = [path for path in paths if os.path.dirname(path) != os.path.realpath(home)]
    assert not outside, outside
    return found


def assert_right_or_told(home: Path, damage: Damage) -> Adapter | str:
    found = load_with(home, damage)
    if not isinstance(found, str) and paths_of(found) != paths_of(EXPECTED[home]):
        return "another path, which only a model can miss: attaching says that it does not exist there"
    if not isinstance(found, str):
        assert same_values(found, EXPECTED[home])
        assert all(found.lower(path).A.shape[0] >= found.ranks[path] for path in found.paths)
    return found


def paths_of(adapter: Adapter) -> set[str]:
    return {*adapter.weights, *(path.rpartition(".")[0] or path for path in adapter.modules)}


def same_values(found: Adapter, expected: Adapter) -> bool:
    """The same tensors, those of a sliced layer in PEFT's form: other slices may say the same product."""
    return found.folded().same_weights(expected.folded())


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another header, and the length in front to match."""
    end = header_end(content)
    header = json.loads(content[8:end])
    text = json.dumps(change(header) or header).encode()
    return struct.pack("<Q", len(text)) + text + content[end:]


def raw(text: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + tail


numbers = st.integers() | st.sampled_from(
    [-1, 0, 1, 2, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
)
words = st.text(max_size=4) | st.sampled_from(["F32", "F64", "I8", "BOOL"])
rubbish = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
