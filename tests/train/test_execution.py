"""What a run decides about the fast path, compiling and sharing, what it says, and that a resume decides alike."""

from __future__ import annotations

import json
import os
from functools import reduce
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
from sideroad.errors import CheckpointError, TrainingError
from sideroad.kernels import compiled
from sideroad.kernels.isolation import PackingRoute, choose_route
from sideroad.train import choosing, events, fingerprint
from sideroad.train.choosing import choose_execution
from sideroad.train.execution import Execution
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
        assert any("the run is long enough to earn it" in note for note in made.notes)

    def test_a_resume_takes_up_the_choice(self) -> None:
        recorded = {"pieces": "eager"}
        assert choose(tiny_llama(), seconds=3600.0, recorded=recorded).pieces.kind == "eager"
        assert choose(tiny_llama(), seconds=1.0, recorded={"pieces": "compiled"}).pieces.kind == "compiled"

    def test_without_a_compiler_auto_is_eager_and_on_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choosing, "refusal", lambda device: "there is no C++ compiler (g++)")
        made = choose(tiny_llama(), seconds=1e9)
        assert made.pieces.kind == "eager"
        assert "though this run would earn it: there is no C++ compiler" in made.notes[-1]
        with pytest.raises(TrainingError, match=r"train.compile: on, but there is no C\+\+ compiler"):
            choose(tiny_llama(), compile="on")

    def test_a_compiler_that_fails_is_found_out_at_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choosing, "failure", lambda pieces, device: "compiling fails here (CppCompileError: g++)")
        made = choose(tiny_llama(), seconds=1e9)
        assert made.pieces.kind == "eager"
        assert "compiling fails here" in made.notes[-1]
        with pytest.raises(TrainingError, match="Set it to off, or to auto"):
            choose(tiny_llama(), compile="on")

    def test_compiled_code_lies_in_our_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        for before, wins in ((default_cache_dir(), False), ("/somewhere", True)):
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
            compiled.compiled(tmp_path)
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == ("/somewhere" if wins else str(tmp_path))
        assert not compiled.is_warm(tmp_path)
        (tmp_path / "code").touch()
        assert compiled.is_warm(tmp_path)

    def test_compile_on_without_the_fast_path_says_that_nothing_is(self) -> None:
        assert choose(tiny_llama(), fast=False, compile="on").notes[0].endswith("so nothing is compiled")

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
        assert any(note.startswith("fast path: all 14 adapted layers") for note in notes)
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


class TestOlderRuns:
    """A run begun before there was a fast path has none of its keys, and goes on as it began."""

    @pytest.mark.usefixtures("quick_plots")
    def test_it_resumes_on_the_plain_path(
        self, tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = small_recipe(tmp_path, shared_model_dir, train={"fast": False}, data={"share_prefixes": "off"})
        whole = train(plain, tmp_path / "whole")

        def stop(event: events.Event) -> None:
            if isinstance(event, events.StepDone) and event.step == 4:
                raise RuntimeError

        monkeypatch.setattr(fingerprint, "recipe_values", as_an_older_version)
        with pytest.raises(RuntimeError):
            train(plain, tmp_path / "run", on_event=stop)
        monkeypatch.setattr(fingerprint, "recipe_values", honest_values)
        environment = tmp_path / "run" / "env.json"
        values = json.loads(environment.read_text())
        del values["execution"]
        environment.write_text(json.dumps(values))
        notes: list[str] = []
        told = lambda event: notes.append(event.text) if isinstance(event, events.Note) else None  # noqa: E731
        changed = small_recipe(tmp_path, shared_model_dir, adapter={"method": {"trains": "B"}})
        with pytest.raises(CheckpointError, match=r'adapter\.method\.trains: "both" in that run, "B" now'):
            train(changed, tmp_path / "run", resume=True)
        again = train(small_recipe(tmp_path, shared_model_dir), tmp_path / "run", resume=True, on_event=told)
        assert records(again.run) == records(whole.run)
        assert "an older sideroad began this run; it goes on on the plain path, as it began" in notes
        assert not any("execution" in note for note in notes)


def as_an_older_version(recipe: Any) -> dict[str, Any]:
    values = honest_values(recipe)
    for key in (*fingerprint.ADDED, *fingerprint.ADDED_AS):
        _, *sections, name = key.split(".")
        del reduce(lambda found, section: found[section], sections, values)[name]
    return values


honest_values = fingerprint.recipe_values


def test_a_padded_route_never_shares() -> None:
    model = tiny_llama()
    attach(model, AdapterConfig(), seed=0)
    made = choose_execution(model, PackingRoute("none", "because"), TrainConfig(), pad_id=0)
    assert not made.shares
    rows = [Encoded([5] * length, [True] * length, "") for length in (9, 12)]
    assert made.lay_out(rows).attention_mask is not None
    assert torch.isfinite(made.loss_of(made.lay_out(rows)))
