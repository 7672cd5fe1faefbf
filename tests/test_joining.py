"""joining: what goes where, ties of rows, copies, and that loading and switching never walk the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import nn

from sideroad import hold, merging, saving_guard, survey, ties
from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError
from sideroad.joining import Placed, copy_of, find_row_ties, start_rows, state_without_adapters
from sideroad.route import walk
from sideroad.survey import Survey


def values(count: int) -> list[Adapter]:
    found = []
    for index in range(count):
        config = AdapterConfig(
            targets=("q_proj", "up_proj"),
            modules_to_save=("lm_head",),
            trainable_tokens={"embed_tokens": (1, 5)},
            method=LoraMethod(rank=2),
        )
        handle = attach(tiny_llama(), config)
        fill(handle, size=0.1 * (index + 1))
        found.append(handle.adapter("default"))
    return found


def test_values_come_load_switch_and_go_without_a_walk_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = values(3)
    model = tiny_llama()
    handle = attach(model, first, "first")
    attach(model, second, "second")
    seen: list[str] = []

    def counted(*args: Any) -> Any:
        seen.append("walk")
        return walk(*args)

    for module in (survey, hold, saving_guard, ties):
        monkeypatch.setattr(module, "walk", counted)
    monkeypatch.setattr("sideroad.route.walk", counted)
    for method in ("named_modules", "named_parameters", "modules", "parameters"):
        plain = getattr(nn.Module, method)

        def spied(self: nn.Module, *args: Any, _plain: Any = plain, _name: str = method, **options: Any) -> Any:
            if self is model or self is model.model:
                seen.append(_name)
            return _plain(self, *args, **options)

        monkeypatch.setattr(nn.Module, method, spied)
    attach(model, third, "third")
    handle.activate("third")
    one = model(IDS).logits
    handle.load("second", third)
    handle.activate("second")
    two = model(IDS).logits
    with handle.using("first"), handle.disabled():
        pass
    handle.adapter("third")
    handle.set_trainable("second")
    handle.detach("third")
    handle.activate("first")
    assert seen == []
    assert torch.equal(one, two)
    # the spies see what does walk
    handle.detach()
    assert "walk" in seen
    assert "named_parameters" in seen


def test_a_value_for_a_model_that_has_changed_since_is_read_anew() -> None:
    first, second = values(2)
    model: Any = tiny_llama()
    handle = attach(model, first, "first")
    q_proj = model.model.layers[0].self_attn.q_proj
    handle.detach()
    handle = attach(model, first, "first")
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    attach(model, second, "second")
    handle.activate("second")
    assert "second" in model.model.layers[1].self_attn.q_proj.lora._modules
    assert "second" in q_proj.lora._modules


def test_ties_of_rows_name_every_other_holder_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "other": nn.Embedding(9, 4)})
    model["head"].weight = model["other"].weight = model["embed"].weight
    model["again"] = model["head"]
    read = Survey(model)
    assert find_row_ties(read, ["embed"]) == {"head": "embed", "other": "embed"}
    assert find_row_ties(read, []) == {}
    with pytest.raises(AdapterError, match="embed and head hold one weight"):
        find_row_ties(read, ["embed", "head"])
    model["bag"] = nn.EmbeddingBag(9, 4)
    model["bag"].weight = model["embed"].weight
    with pytest.raises(AdapterError, match=r"bag \(EmbeddingBag\) holds the weight of embed, but trained rows cannot"):
        find_row_ties(Survey(model), ["embed"])


def test_placed_lists_pairs_and_everything() -> None:
    A = torch.zeros(1, 1)
    placed = Placed({"one": {"A": A, "B": A}, "two": {"bias": A[0]}}, {"three": {"weight": A}})
    assert placed.targets == ("one",)
    assert placed.paths == ("one", "two", "three")


def test_a_copy_holds_the_given_state_and_no_adapter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    keys = list(model.state_dict())
    fill(attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=2))))
    assert list(state_without_adapters(model)) == keys
    state = {name: torch.full_like(one, 2) for name, one in state_without_adapters(model).items()}
    twin = copy_of(model, state)
    assert all(torch.equal(one, state[name]) for name, one in twin.state_dict().items())
    assert list(twin.state_dict()) == keys
    assert not (model[0].weight == 2).any()
    with torch.device("meta"):
        empty = nn.Linear(3, 3)
    with pytest.raises(AdapterError, match="the base is on the meta device, but the adapter has tensors"):
        copy_of(empty, {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)})
    assert copy_of(empty, dict(empty.state_dict())).weight.is_meta


def test_rows_start_as_copies_of_the_base_s() -> None:
    layer = nn.Embedding(5, 2)
    rows = start_rows(layer, (3, 0))["rows"]
    assert torch.equal(rows, layer.weight[[3, 0]])
    rows.zero_()
    assert layer.weight.all()


def test_merging_knows_no_names_of_its_own() -> None:
    assert merging.place("a.b", "c.weight") == ("a.b.c", "weight")
    assert merging.place("", "weight") == ("", "weight")
