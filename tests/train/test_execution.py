"""What a run decides about the fast path, compiling and sharing, what it says, and that a resume decides alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import records, small_recipe, tiny_gpt2_dir
from tiny import tiny_llama
from zoo import gpt2, mistral

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.data.encode import Encoded
from sideroad.errors import TrainingError
from sideroad.kernels import compiled
from sideroad.kernels.isolation import PackingRoute, choose_route
from sideroad.train import events, execution
from sideroad.train.execution import Execution, choose_execution
from sideroad.train.run import train
from sideroad.train.settings import TrainConfig


def choose(model: Any, dropout: float = 0.0, **config: Any) -> Execution:
    asked = {name: config.pop(name) for name in ("share", "seconds", "recorded", "repeats") if name in config}
    attach(model, AdapterConfig(method=LoraMethod(dropout=dropout)), seed=0)
    return choose_execution(model, choose_route(model), TrainConfig(**config), pad_id=0, **asked)


def test_the_plain_path_is_one_key_away() -> None:
    made = choose(tiny_llama(), fast=False)
    assert (made.fast, made.head, made.shares) == (None, None, False)
    assert made.notes == ("fast path: off, as the recipe says",)
    assert made.to_json() == {"path": "plain", "pieces": "eager", "shares": False, "frozen_blocks": 0}


def test_beginnings_are_shared_only_where_that_is_exact() -> None:
    assert choose(tiny_llama()).reach is None
    assert choose(mistral(sliding_window=20)).reach == 20
    assert not choose(tiny_llama(), share=False).shares
    for made in (choose(tiny_llama(), dropout=0.1), choose(gpt2(attn_pdrop=0.1)), choose(gpt2(resid_pdrop=0.1))):
        assert not made.shares
        assert any("each copy has dropout of its own" in note for note in made.notes)


def test_a_sequence_beyond_the_window_is_not_shared() -> None:
    made = choose(mistral(sliding_window=20))
    short = [Encoded([5] * 10 + [number], [True] * 11, "") for number in range(3)]
    long = [Encoded([5] * 20 + [number], [True] * 21, "") for number in range(3)]
    assert made.lay_out(short).computed_tokens < 33
    assert made.lay_out(long).computed_tokens == 63


class TestCompiling:
    def test_auto_compiles_only_what_earns_it(self) -> None:
        assert choose(tiny_llama()).pieces.kind == "eager"
        assert choose(tiny_llama(), seconds=30.0).pieces.kind == "eager"
        made = choose(tiny_llama(), seconds=3600.0)
        assert made.pieces.kind == "compiled"
        assert "elementwise pieces are compiled: about 60 minutes earn it" in made.notes

    def test_a_resume_takes_up_the_choice(self) -> None:
        recorded = {"pieces": "eager"}
        assert choose(tiny_llama(), seconds=3600.0, recorded=recorded).pieces.kind == "eager"
        assert choose(tiny_llama(), seconds=1.0, recorded={"pieces": "compiled"}).pieces.kind == "compiled"

    def test_without_a_compiler_auto_is_eager_and_on_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(execution, "refusal", lambda device: "there is no C++ compiler (g++)")
        assert choose(tiny_llama(), seconds=1e9).pieces.kind == "eager"
        with pytest.raises(TrainingError, match=r"train.compile: on, but there is no C\+\+ compiler"):
            choose(tiny_llama(), compile="on")

    def test_a_warm_cache_needs_a_shorter_run(self) -> None:
        seconds = 1.1 * 2 * compiled.WARM_SECONDS / compiled.GAIN
        assert compiled.earns(seconds, warm=True)
        assert not compiled.earns(seconds, warm=False)


@pytest.mark.usefixtures("quick_plots")
class TestRuns:
    def test_fast_and_plain_runs_have_the_same_curve(self, tmp_path: Path, shared_model_dir: Path) -> None:
        found = []
        for fast in (True, False):
            recipe = small_recipe(tmp_path, shared_model_dir, train={"fast": fast, "epochs": 4})
            found.append(records(train(recipe, tmp_path / str(fast)).run))
        assert len(found[0]) == len(found[1]) > 12
        for one, other in zip(*found, strict=True):
            for key in ("loss", "validation_loss", "grad_norm"):
                assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=2e-3)

    def test_what_is_decided_is_said_and_recorded(self, tmp_path: Path, shared_model_dir: Path) -> None:
        seen: list[events.Event] = []
        result = train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run", on_event=seen.append)
        notes = [event.text for event in seen if isinstance(event, events.Note)]
        assert any(note.startswith("fast path: 14 linear layers") for note in notes)
        (planned,) = (event for event in seen if isinstance(event, events.Planned))
        steps = [record for record in records(result.run) if "real_tokens" in record]
        saved = sum(step["real_tokens"] - step["computed_tokens"] for step in steps)
        assert planned.saved_tokens == saved > 0
        assert result.speed is not None
        assert result.speed.saved_tokens == saved
        again = train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run", resume=True)
        assert again.speed == result.speed

    def test_a_model_with_dropout_of_its_own_trains_unshared(self, tmp_path: Path) -> None:
        recipe = small_recipe(tmp_path, tiny_gpt2_dir(tmp_path), train={"max_steps": 2})
        (record, *_) = [one for one in records(train(recipe, tmp_path / "run").run) if "real_tokens" in one]
        assert record["computed_tokens"] == record["real_tokens"]


def test_a_padded_route_never_shares() -> None:
    model = tiny_llama()
    attach(model, AdapterConfig(), seed=0)
    made = choose_execution(model, PackingRoute("none", "because"), TrainConfig(), pad_id=0)
    assert not made.shares
    rows = [Encoded([5] * length, [True] * length, "") for length in (9, 12)]
    assert made.lay_out(rows).attention_mask is not None
    assert torch.isfinite(made.loss_of(made.lay_out(rows)))
