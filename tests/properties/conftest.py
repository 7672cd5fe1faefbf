"""Saved adapters for the tests that damage them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from damaged import EXPECTED, GOOD, INDEX, RICH, SHARDS, WEIGHTS

from sideroad.tensor_files import read_tensors, write_tensors


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
