"""base/vocabulary: the published size, from files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_model_dir
from transformers import LlamaForCausalLM

from sideroad.base.vocabulary import published_rows


def test_a_model_from_a_directory(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir(tmp_path))
    model.resize_token_embeddings(300, mean_resizing=False)
    assert published_rows(model) == 259


def test_a_model_whose_text_part_has_the_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    assert published_rows(model) == 7


@pytest.mark.parametrize("name", ["", "nobody/has-this", "not a name", "/no/such/place"])
def test_unknown_places_give_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    model = tiny_llama()
    model.config._name_or_path = name
    assert published_rows(model) is None


def test_broken_files_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    assert published_rows(model) is None
    assert published_rows(object()) is None
