"""Training adapters of fused experts: fast as plain, resumed as uninterrupted, idle experts unmoved, files that act."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixtures import mixture
from small_runs import assert_same_run, small_recipe, step_losses
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.mixtures import stacked_parameters
from sideroad.survey import Survey
from sideroad.train import events
from sideroad.train.interrupts import Interrupted
from sideroad.train.run import train

pytestmark = pytest.mark.usefixtures("quick_plots")


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / request.param
    mixture(request.param, vocab_size=259, max_position_embeddings=512).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_fast_and_plain_runs_have_the_same_curve_and_say_what_they_adapt(tmp_path: Path, base: Path) -> None:
    losses, notes = [], []
    for fast in (True, False):
        recipe = small_recipe(tmp_path, base, train={"fast": fast})
        seen: list[events.Event] = []
        run = train(recipe, tmp_path / str(fast), on_event=seen.append).run
        losses.append(step_losses(run))
        notes.append([event.text for event in seen if isinstance(event, events.Note)])
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert any("all-linear covers the fused experts" in note for note in notes[0])
    assert any("computes its experts itself" in note for note in notes[0])
    model = AutoModelForCausalLM.from_pretrained(base)
    value = Adapter.load(tmp_path / "True" / "adapter")
    assert len([path for path in value.paths if "experts." in path]) == 4
    attach(model, value)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, base: Path) -> None:
    recipe = small_recipe(tmp_path, base, optim={"weight_decay": 0.1})
    whole = train(recipe, tmp_path / "whole").run

    def stop(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", on_event=stop)
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_the_parameters_of_experts_are_known_by_name() -> None:
    model = mixture("mixtral")
    handle = attach(model, AdapterConfig(targets=("q_proj", "gate_up_proj"), method=LoraMethod(rank=2)))
    found = stacked_parameters(Survey(model), handle.parameters("default"))
    assert found == {
        f"model.layers.{n}.mlp.experts.gate_up_proj.{part}": 4 for n in (0, 1) for part in ("A", "B")
    }
    assert all(handle.parameters("default")[name].shape[0] % 4 == 0 for name in found)
