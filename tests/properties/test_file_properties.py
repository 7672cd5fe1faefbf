"""Adapter directories damaged in every way: an error that helps, or exactly the right tensors; nothing else, ever."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import AMOUNTS, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sideroad.adapter import Adapter, BaseRecord
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import SideroadError
from sideroad.tensor_files import read_tensors, write_tensors

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


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rich") / "adapter"
    RICH.save(home)
    EXPECTED[home] = RICH
    return home


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("single") / "adapter"
    GOOD.save(home)
    EXPECTED[home] = GOOD
    return home


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sharded") / "adapter"
    GOOD.save(home)
    EXPECTED[home] = GOOD
    tensors = read_tensors(home / WEIGHTS)
    (home / WEIGHTS).unlink()
    places = {key: SHARDS[n % 2] for n, key in enumerate(tensors)}
    for shard in SHARDS:
        write_tensors(home / shard, {key: tensor for key, tensor in tensors.items() if places[key] == shard})
    (home / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return home


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


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any unpickling fails the test, also one inside a `try` of the library: nothing catches this."""

    class UnpickledError(BaseException):
        pass

    def refuse(*args: object, **kwargs: object) -> None:
        raise UnpickledError

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


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
    return found._plain().same_weights(expected._plain())


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another header, and the length in front to match."""
    end = header_end(content)
    header = json.loads(content[8:end])
    text = json.dumps(change(header) or header).encode()
    return struct.pack("<Q", len(text)) + text + content[end:]


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


numbers = st.integers() | st.sampled_from(
    [-1, 0, 1, 2, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
)
words = st.text(max_size=4) | st.sampled_from(["F32", "F64", "I8", "BOOL"])
rubbish = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


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


def raw(text: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + tail


def nested(depth: int, sign: str = "[]") -> str:
    return ("[" * depth + "]" * depth) if sign == "[]" else ('{"a":' * depth + "1" + "}" * depth)


@pytest.mark.parametrize("sign", ["[]", "{}"])
@pytest.mark.parametrize("depth", [90, 101, 500, 900, *range(930, 1010, 6), 100_000])
def test_json_nested_to_any_depth(single: Path, depth: int, sign: str) -> None:
    bomb = nested(depth, sign)
    for name in (CONFIG, MANIFEST):
        text = (single / name).read_text().rstrip().removesuffix("}")
        for key in ("novel", "r", "target_modules", "config", "base"):
            assert_right_or_told(single, {name: f'{text}, "{key}x": {bomb}}}'.encode()})
        found = load_with(single, {name: f'{{"config": {bomb}, "base": {bomb}, "peft_type": {bomb}}}'.encode()})
        assert isinstance(found, str)
    for header in (bomb, f'{{"a": {bomb}}}', f'{{"a": {{"dtype": "F32", "shape": {bomb}, "data_offsets": {bomb}}}}}'):
        assert isinstance(load_with(single, {WEIGHTS: raw(header.encode())}), str)


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


JSON_FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_type", "task_type", "lora_dropout", "use_rslora",
    "base_model_name_or_path", "use_dora", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "enable_lora", "novelty", "base", "config", "a" * 3000,
)  # fmt: skip
EXACT_FIELDS = tuple(AdapterConfig.model_fields)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 2, 1.5, 1e308, 10**300, 10**400, "", " ", "x", "x" * 25_000, "(", "(" * 3000,
    "(" * 3000 + ")" * 3000, "a{99999999999}", "half \ud800", "*", "re:(", "all-linear", "0-99999999", [], [[]], {},
    [{}], [None], [1, 5], [1, 1], [10**300], ["x" * 50] * 500, ["half \ud800"], ["score"], ["m.score", "x" * 25_000],
    ["re:("], {"(": 2}, {"v_proj": 10**400}, {"v_proj": 1e308}, {"x" * 25_000: 2}, {"embed": [1, 5]},
    {"embed": [1, 10**400]}, {"x": [1]}, {"qkv": [True, True]}, {"q": [[-3, True], [6, True]]}, {"*": [True]},
    {"q": [[2**63, True], [3 - 2**63, True]]}, {"qkv": [[0, True], [6, True]]}, {"conv": [True, True]}, {"(": [True]},
    {"re:(": [True]}, {"tok": [[4, True]]}, {"qkv": [[6, True], [0, True]]}, {"targets": ["re:("]},
    {"name": "x" * 25_000}, [True], [True, True], [True, False, True], [False, True] * 40,
)  # fmt: skip


def with_field(home: Path, field: str, value: Any) -> Iterator[Damage]:
    """The directory with another value in a field of either file, or of the configuration in sideroad.json."""
    for name in (CONFIG, MANIFEST):
        if (home / name).exists() and field in JSON_FIELDS:
            fields = json.loads((home / name).read_text())
            yield {name: json.dumps({**fields, field: value}).encode()}
    if field in EXACT_FIELDS:
        exact = EXPECTED[home].config.model_dump(mode="json")
        yield {MANIFEST: json.dumps({"config": {**exact, field: value}}).encode()}


@pytest.mark.parametrize("field", dict.fromkeys([*JSON_FIELDS, *EXACT_FIELDS]), ids=lambda field: field[:20])
@AMOUNTS
def test_each_odd_value_in_each_field(single: Path, rich: Path, field: str, amount: int) -> None:
    for home in (rich, single)[:amount]:
        for value in ODD:
            for damage in with_field(home, field, value):
                assert_right_or_told(home, damage)


@AMOUNTS
def test_any_json_in_any_fields(single: Path, rich: Path, amount: int) -> None:
    @given(
        home=st.sampled_from([single, rich]),
        name=st.sampled_from([CONFIG, MANIFEST]),
        changes=st.dictionaries(st.sampled_from(JSON_FIELDS), rubbish | st.sampled_from(ODD), min_size=1, max_size=3),
    )
    def check(home: Path, name: str, changes: dict[str, Any]) -> None:
        fields = json.loads((home / name).read_text())
        assert_right_or_told(home, {name: json.dumps({**fields, **changes}).encode()})

    run(check, 100, amount)
