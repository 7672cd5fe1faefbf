"""route: keys that any name can become, and a walk that passes our own modules by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sideroad.route import Deltas, Route, close_layer, deltas_of, escape, open_layer, unescape, walk

AWKWARD = ["a.b", "a%2Eb", "%", "forward", "route", "handle", "training", "put", "_modules", "ü.ñ", "A", "lora", " "]


@given(name=st.one_of(st.sampled_from(AWKWARD), st.text(st.characters(codec="utf-8"), min_size=1)))
def test_any_name_survives_and_is_a_free_attribute(name: str) -> None:
    key = escape(name)
    assert "." not in key
    assert unescape(key) == name
    assert not hasattr(Deltas(Route()), key)


@pytest.mark.parametrize(("name", "key"), [("default", "default"), ("v1.2", "v1%2E2"), ("forward", "%66orward")])
def test_keys_are_readable(name: str, key: str) -> None:
    assert escape(name) == key


def test_open_and_close_leave_the_layer_as_it_was() -> None:
    layer = nn.Linear(2, 2).eval()
    deltas = open_layer(layer, Route())
    assert open_layer(layer, Route()) is deltas
    assert not deltas.training
    assert len(layer._forward_hooks) == len(layer._forward_hooks_with_kwargs) == 1
    assert deltas_of(layer) is deltas
    close_layer(layer)
    assert not layer._forward_hooks
    assert not layer._forward_hooks_with_kwargs
    assert not layer._modules


def test_walk_passes_ours_by_and_names_aliases() -> None:
    layer = nn.Linear(2, 2)
    open_layer(layer, Route())
    model = nn.ModuleDict({"one": layer, "box": nn.ModuleList([layer])})
    assert [path for path, _ in walk(model)] == ["", "one", "box", "box.0"]
