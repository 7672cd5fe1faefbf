"""Saved adapters for the tests that damage them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from damaged import EXPECTED, GOOD, INDEX, RICH, SHARDS, WEIGHTS

from sideroad.adapter import Adapter
from sideroad.tensor_files import read_tensors, write_tensors


def saved(factory: pytest.TempPathFactory, adapter: Adapter) -> Path:
    """Save an adapter to a directory of its own, and note it as what is expected there."""
    home = factory.mktemp("saved") / "adapter"
    adapter.save(home)
    EXPECTED[home] = adapter
    return home


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, RICH)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, GOOD)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = saved(tmp_path_factory, GOOD)
    tensors = read_tensors(home / WEIGHTS)
    (home / WEIGHTS).unlink()
    places = {key: SHARDS[n % 2] for n, key in enumerate(tensors)}
    for shard in SHARDS:
        write_tensors(home / shard, {key: tensor for key, tensor in tensors.items() if places[key] == shard})
    (home / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return home


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any unpickling fails the test, also one inside a `try` of the library: nothing catches this."""

    class UnpickledError(BaseException):
        pass

    def refuse(*args: object, **kwargs: object) -> None:
        raise UnpickledError

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
