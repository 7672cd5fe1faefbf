"""roster: names that are known, names that are not, and weights that are numbers."""

from __future__ import annotations

import pytest
from tiny import IDS, tiny_llama

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.roster import Entry, Roster


def two() -> Roster:
    roster = Roster()
    for name in ("red", "green"):
        roster.entries[name] = Entry(Adapter(config=AdapterConfig(), weights={}, base=None), (), (name,))
    return roster


def test_finds_what_is_there_and_says_what_is() -> None:
    assert two().find("green").paths == ("green",)
    with pytest.raises(AdapterError, match=r'no adapter is named "gren". Attached: red, green. Did you mean "green"\?'):
        two().find("gren")
    with pytest.raises(AdapterError, match=r'no adapter is named "red". Attached: none.$'):
        Roster().find("red")


def test_a_new_name_is_free_and_not_empty() -> None:
    two().refuse_new("blue")
    with pytest.raises(AdapterError, match='an adapter named "red" is attached already'):
        two().refuse_new("red")
    with pytest.raises(AdapterError, match="name cannot be empty"):
        two().refuse_new("")


def test_every_way_of_naming_becomes_weights() -> None:
    assert two().weights("red") == {"red": 1.0}
    assert two().weights(["red", "green"]) == {"red": 1.0, "green": 1.0}
    assert two().weights({"green": 2}) == {"green": 2.0}
    assert two().weights(()) == {}
    with pytest.raises(AdapterError, match='weight of adapter "red" is inf; it must be a finite number'):
        two().weights({"red": float("inf")})


def test_what_follows_a_replaced_embedding_is_replaced_too() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    attach(model, AdapterConfig(targets="lm_head"), "a")
    both = AdapterConfig(targets="q_proj", modules_to_save=("embed_tokens",), tie_embeddings=True)
    handle = attach(model, both, "b")
    with pytest.raises(AdapterError, match=r'"b" replaces lm_head \(modules_to_save\), and "a" changes lm_head'):
        handle.activate(("a", "b"))


def test_an_adapter_inside_a_copied_module_cannot_share_a_batch_with_it() -> None:
    model = tiny_llama()
    attach(model, AdapterConfig(targets="q_proj", modules_to_save=("mlp",)), "a")
    handle = attach(model, AdapterConfig(targets="up_proj"), "b")
    words = r'"a" replaces .*mlp \(modules_to_save\), and "b" acts inside it'
    with pytest.raises(AdapterError, match=words), handle.rows(["a", "b"]):
        pass
    with handle.rows(["a", None]):
        model(IDS.expand(2, -1))
