"""saving_guard: an attached model does not write adapter tensors into a model file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from tiny import tiny_llama

from sideroad.attaching import attach, attached
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError


def test_save_pretrained_offers_three_ways(tmp_path: Path) -> None:
    model = tiny_llama()
    handle = attach(model, AdapterConfig())
    for one in (model, model.model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AdapterError) as caught:
            one.save_pretrained(tmp_path / "x", safe_serialization=True)
        for part in ("the adapter: ", "adapter(name).save(", "the merged model:", "merge_and_unload()", "the base: "):
            assert part in str(caught.value)
    assert not (tmp_path / "x").exists()
    handle.adapter("default").save(tmp_path / "adapter")
    handle.detach()
    model.save_pretrained(tmp_path / "base")
    assert "save_pretrained" not in vars(model)
    assert "save_pretrained" not in vars(model.model)


def test_a_copy_is_guarded_and_freed_on_its_own(tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, AdapterConfig())
    twin = copy.deepcopy(model)
    other = attached(twin)
    assert other is not None
    other.merge_and_unload().save_pretrained(tmp_path / "merged")
    with pytest.raises(AdapterError, match="adapter tensors"):
        model.save_pretrained(tmp_path / "x")


def test_an_instance_method_of_the_model_comes_back(tmp_path: Path) -> None:
    model = tiny_llama()
    mine = lambda *_: "mine"  # noqa: E731
    model.save_pretrained = mine
    handle = attach(model, AdapterConfig())
    attach(model, AdapterConfig(), "second")
    with pytest.raises(AdapterError):
        model.save_pretrained(tmp_path)
    handle.detach()
    assert model.save_pretrained is mine
