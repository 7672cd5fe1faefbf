"""Adapter names: whatever they are, each adapter keeps its own tensors, on the model and on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from amounts import AMOUNTS, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.adapter_files import directory_name
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.route import Deltas, escape, unescape

ODD = (
    "forward", "weight", "lora", "train", "training", "__class__", "_modules", "_parameters", "handle", "put", "route",
    "default", "A", "B", "bias", "a", "a.b", "a.b.c", ".", "..", "../x", "/etc/passwd", "~", "~root", "a%2Eb", "%",
    "%%", "%25", "%2E", "%66orward", " ", "  ", "\t", "\n", "a\nb", "\0", "CON", "é", "e\u0301", "🦜", "name" * 100,
    "*", "ü" * 300, "base", "None", "-", "%-", "\ud800", ".hidden", "a/b", "a\\b", "A.B", "\u202e",
)  # fmt: skip
"""Names that mean something to somebody: attributes, patterns, paths, escapes."""

texts = st.sampled_from(ODD) | st.text(min_size=1) | st.text("aA.%/2E5", min_size=1, max_size=5)
anything = texts | st.text(st.characters(), min_size=1, max_size=300)
IN, OUT = 3, 2


class Pair(nn.Module):
    """Two layers, whose names are among an adapter's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Linear(IN, OUT)
        self.default = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.lora(x), self.default(x)])


def value_of(index: int) -> Adapter:
    draw = torch.Generator().manual_seed(index)
    config = AdapterConfig(method=LoraMethod(rank=1, alpha=1))
    weights = {
        path: {"A": torch.randn(1, IN, generator=draw), "B": torch.randn(OUT, 1, generator=draw)}
        for path in ("lora", "default")
    }
    return Adapter(config, weights)


def added(value: Adapter, x: Tensor) -> Tensor:
    return torch.stack([x @ (leaves["B"] @ leaves["A"]).T for leaves in value.weights.values()])


def assert_each_is_itself(handle: Attached, values: dict[str, Adapter]) -> None:
    x = torch.ones(1, IN)
    with handle.disabled():
        base = handle.model(x)
    assert handle.names == tuple(values)
    for name, value in values.items():
        assert handle.adapter(name).same_weights(value), name
        with handle.using(name):
            assert handle.active == {name: 1.0}
            torch.testing.assert_close(handle.model(x), base + added(value, x))
    if values:
        with handle.using(list(values)):
            torch.testing.assert_close(handle.model(x), base + sum(added(value, x) for value in values.values()))


@AMOUNTS
def test_each_name_keeps_its_own_tensors(tmp_path: Path, amount: int) -> None:
    @given(names=st.lists(texts, min_size=1, max_size=5, unique=True), data=st.data())
    def check(names: list[str], data: st.DataObject) -> None:
        values = {name: value_of(index) for index, name in enumerate(names)}
        model = Pair()
        keys, bytes_before = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
        for name, value in values.items():
            handle = attach(model, value, name)
        assert_each_is_itself(handle, values)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert len(state) == len(keys) + 4 * len(names)
        model.load_state_dict(state)
        assert_each_is_itself(handle, values)
        home = tmp_path / "home"
        for name in names:
            handle.adapter(name).save(home / directory_name(name))
        assert len(list(home.iterdir())) == len(names)
        assert [entry.name for entry in tmp_path.iterdir()] == ["home"]
        for name in data.draw(st.permutations(names)):
            handle.detach(name)
            removed = values.pop(name)
            if values:
                assert_each_is_itself(handle, values)
            assert Adapter.load(home / directory_name(name)).same_weights(removed)
        shutil.rmtree(home)
        assert attached(model) is None
        assert list(model.state_dict()) == keys
        assert all(torch.equal(tensor, bytes_before[key]) for key, tensor in model.state_dict().items())

    run(check, 40, amount)


@AMOUNTS
def test_names_and_module_keys_are_a_bijection(amount: int) -> None:
    @given(name=anything, other=anything)
    def check(name: str, other: str) -> None:
        key = escape(name)
        assert unescape(key) == name
        assert "." not in key
        assert not hasattr(Deltas, key)
        assert key not in vars(Deltas(None))  # type: ignore[arg-type]
        assert (key == escape(other)) == (name == other)

    run(check, 300, amount)


@AMOUNTS
def test_directory_names_lead_nowhere_else(amount: int) -> None:
    @given(name=anything, other=anything)
    def check(name: str, other: str) -> None:
        found = directory_name(name)
        assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.%")
        assert not found.startswith(".")
        assert 0 < len(found) <= 200
        assert (found == directory_name(other)) == (name == other)

    run(check, 300, amount)


def test_plain_names_stay_as_they_are() -> None:
    for name in ("default", "poet-v1.2", "My_Adapter"):
        assert directory_name(name) == name
    assert directory_name("../x") == "%2E.%2Fx"
    assert directory_name("a b") == "a%20b"
    assert directory_name(directory_name("ü" * 300)) != directory_name("ü" * 300)
