"""Weight files damaged in every way: an error that helps, or exactly the right tensors; nothing else, ever."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import AMOUNTS, run
from damaged import (
    EXPECTED,
    GOOD,
    ROOT,
    WEIGHTS,
    assert_right_or_told,
    header_end,
    load_with,
    numbers,
    rubbish,
    with_header,
)
from hypothesis import given
from hypothesis import strategies as st

from sideroad.adapter import Adapter

pytestmark = pytest.mark.usefixtures("no_pickles")


def test_the_undamaged_directories_load(single: Path, sharded: Path, rich: Path) -> None:
    for home in (single, sharded, rich):
        found = load_with(home, {})
        assert isinstance(found, Adapter)
        assert found.same_weights(EXPECTED[home])
        assert list(found.weights) == list(EXPECTED[home].weights)
        assert found.config == EXPECTED[home].config


@AMOUNTS
def test_truncation_at_any_byte_is_noticed(single: Path, sharded: Path, rich: Path, amount: int) -> None:
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        home = data.draw(st.sampled_from([single, sharded, rich]))
        name = data.draw(st.sampled_from(sorted(os.listdir(home))))
        content = (home / name).read_bytes()
        kept = data.draw(st.integers(0, len(content) - 1))
        found = assert_right_or_told(home, {name: content[:kept]})
        # a last line break of JSON is nobody's
        assert isinstance(found, str) or content[kept:] == b"\n"

    run(check, 150, amount)


@AMOUNTS
def test_flipped_bits_in_headers_and_json(single: Path, sharded: Path, rich: Path, amount: int) -> None:
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        home = data.draw(st.sampled_from([single, sharded, rich]))
        name = data.draw(st.sampled_from(sorted(os.listdir(home))))
        content = bytearray((home / name).read_bytes())
        end = header_end(content) if name.endswith(".safetensors") else len(content)
        for bit in data.draw(st.lists(st.integers(0, end * 8 - 1), min_size=1, max_size=3)):
            content[bit // 8] ^= 1 << bit % 8
        assert_right_or_told(home, {name: bytes(content)})

    run(check, 300, amount)


@AMOUNTS
def test_flipped_bits_in_the_numbers_change_those_numbers_only(single: Path, amount: int) -> None:
    content = (single / WEIGHTS).read_bytes()
    end = header_end(content)

    @given(bit=st.integers(end * 8, len(content) * 8 - 1))
    def check(bit: int) -> None:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        found = load_with(single, {WEIGHTS: bytes(changed)})
        if isinstance(found, str):
            assert "NaN or infinite" in found
            return
        differing = [
            (path, leaf)
            for path, leaves in GOOD.weights.items()
            for leaf, tensor in leaves.items()
            if not torch.equal(tensor.view(torch.int32), found.weights[path][leaf].view(torch.int32))
        ]
        assert len(differing) == 1
        assert found.config == GOOD.config

    run(check, 40, amount)


def names_and_shapes(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


@AMOUNTS
def test_exchanged_tensors_are_noticed_wherever_shapes_tell(single: Path, amount: int) -> None:
    content = (single / WEIGHTS).read_bytes()

    @given(order=st.permutations(range(6)))
    def check(order: list[int]) -> None:
        found_names: list[str] = []

        def exchange(header: dict[str, Any]) -> dict[str, Any]:
            found_names[:] = names_and_shapes(header)
            moved = dict(zip(found_names, (header[found_names[place]] for place in order), strict=True))
            return {"__metadata__": {"format": "pt"}, **moved}

        found = load_with(single, {WEIGHTS: with_header(content, exchange)})
        tensors = ((path, leaf, tensor) for path, leaves in GOOD.weights.items() for leaf, tensor in leaves.items())
        shapes = {f"{ROOT}{path}.lora_{leaf}.weight": tensor.shape for path, leaf, tensor in tensors}
        fits = all(shapes[found_names[place]] == shapes[name] for name, place in zip(found_names, order, strict=True))
        if isinstance(found, str):
            assert not fits
        else:
            ranks = {path: (leaves["A"].shape[0], leaves["B"].shape[1]) for path, leaves in found.weights.items()}
            assert all(left == right == GOOD.ranks[path] for path, (left, right) in ranks.items())

    run(check, 100, amount)


@AMOUNTS
def test_absurd_headers_are_refused_before_anything_is_allocated(
    single: Path, rich: Path, monkeypatch: pytest.MonkeyPatch, amount: int
) -> None:
    most = max((home / WEIGHTS).stat().st_size for home in (single, rich))
    largest = [0]

    def counted(size: Any = b"") -> bytearray:
        largest[0] = max(largest[0], size if isinstance(size, int) else len(size))
        assert largest[0] <= most, "allocated before it was checked"
        return bytearray(size)

    monkeypatch.setattr("sideroad.tensor_files.bytearray", counted, raising=False)

    @given(data=st.data(), home=st.sampled_from([single, rich]))
    def check(data: st.DataObject, home: Path) -> None:
        def change(header: dict[str, Any]) -> Any:
            name = data.draw(st.sampled_from(names_and_shapes(header)))
            what = data.draw(st.sampled_from(["shape", "data_offsets", "both", "dtype", "entry", "add", "name", "all"]))
            if what == "both":
                size = data.draw(st.sampled_from([2**20, 2**40, 2**62]))
                header[name] |= {"shape": [size], "data_offsets": [0, 4 * size]}
            elif what in ("shape", "data_offsets"):
                header[name][what] = data.draw(st.lists(numbers, max_size=4) | rubbish)
            elif what == "dtype":
                header[name]["dtype"] = data.draw(rubbish)
            elif what == "entry":
                header[name] = data.draw(rubbish)
            elif what == "add":
                header[data.draw(st.text(max_size=9))] = data.draw(st.just(header[name]) | rubbish)
            elif what == "name":
                header[data.draw(st.text(max_size=9) | st.just(ROOT + "9" * 5000))] = header.pop(name)
            else:
                return data.draw(rubbish)
            return header

        assert_right_or_told(home, {WEIGHTS: with_header((home / WEIGHTS).read_bytes(), change)})

    run(check, 250, amount)
    assert largest[0]
