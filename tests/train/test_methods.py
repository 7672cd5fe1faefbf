"""Every method trains, resumes bit for bit, keeps its best, and leaves an ordinary adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same_run, small_recipe, step_losses, tiny_gpt2_dir
from tiny import IDS, tiny_model_dir, write_jsonl

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.base.config import BaseConfig
from sideroad.base.loading import load_base
from sideroad.train import events
from sideroad.train.interrupts import Interrupted
from sideroad.train.loop import Loop
from sideroad.train.run import train

pytestmark = pytest.mark.usefixtures("quick_plots")

METHODS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "dora", "rank": 4, "dropout": 0.1},
    "lora-fa": {"rank": 4, "trains": "B"},
    "adalora": {"kind": "adalora", "rank": 4, "target_rank": 2, "every": 1, "warmup": 0.2, "final": 0.3},
    "pissa": {"rank": 4, "init": "pissa"},
    "eva": {"rank": 4, "init": {"kind": "eva", "batches": 2}},
    "lora-ga": {"rank": 4, "init": {"kind": "lora-ga", "batches": 2}},
    "dora-eva": {"kind": "dora", "rank": 2, "init": "eva", "scaling": "alpha/sqrt(r)"},
}


def stop_after(step: int) -> Any:
    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == step:
            raise KeyboardInterrupt

    return on_event


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_resumes_and_leaves_an_adapter(tmp_path: Path, shared_model_dir: Path, name: str) -> None:
    method = METHODS[name]
    recipe = small_recipe(tmp_path, shared_model_dir, adapter={"method": method}, train={"keep": "best"})
    whole = train(recipe, tmp_path / "whole")
    losses = step_losses(whole.run)
    # AdaLoRA's triplets begin at zero between two small factors
    assert losses[-1] < (1.0 if name == "adalora" else 0.97) * losses[0]
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", on_event=stop_after(3))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole.run)
    base = load_base(BaseConfig(model=str(shared_model_dir), dtype="float32", device="cpu"))
    before = base.model(IDS).logits
    value = Adapter.load(whole.adapter)
    attach(base.model, value)
    assert not torch.equal(base.model(IDS).logits, before)
    if name == "adalora":
        assert sum(value.ranks.values()) == 2 * 14
        assert value.config.method.kind == "lora"


BESIDE = {
    "bias": {"bias": "adapted"},
    "rows": {"trainable_tokens": {"embed_tokens": [5, 6, 70]}},
    "whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_triplets_resumes_and_is_kept_too(tmp_path: Path, name: str) -> None:
    model = tiny_gpt2_dir(tmp_path) if name == "bias" else tiny_model_dir(tmp_path / "model")
    method = {**METHODS["adalora"], "target_rank": 1}
    recipe = small_recipe(tmp_path, model, adapter={"method": method, **BESIDE[name]}, train={"keep": "best"})
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", on_event=stop_after(3))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole.run)
    best = Adapter.load(tmp_path / f"run/checkpoints/step-{whole.best_step:08d}/adapter")
    assert best.same_weights(Adapter.load(whole.adapter))


def test_adaloras_best_is_one_of_the_final_budget(tmp_path: Path, shared_model_dir: Path) -> None:
    strange = [{"messages": [{"role": "user", "content": "%"}, {"role": "assistant", "content": "#~^" * 9}]}] * 4
    recipe = small_recipe(
        tmp_path,
        shared_model_dir,
        adapter={"method": {**METHODS["adalora"], "warmup": 0.5}},
        train={"keep": "best", "epochs": 4, "validate_every": 1, "early_stopping": 1},
        optim={"lr": 0.3, "schedule": "constant"},
        data={"validation": str(write_jsonl(tmp_path / "strange.jsonl", strange))},
    )
    result = train(recipe, tmp_path / "run")
    assert result.best_step is not None
    assert result.best_step >= 8
    assert sum(Adapter.load(result.adapter).ranks.values()) == 2 * 14


def test_the_best_of_an_adalora_run_is_put_back(
    tmp_path: Path, shared_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "_validation_loss", lambda self: 1.0 + abs(self.progress.step - 10))
    recipe = small_recipe(
        tmp_path,
        shared_model_dir,
        adapter={"method": METHODS["adalora"]},
        train={"keep": "best", "keep_checkpoints": 1, "epochs": 4},
    )
    result = train(recipe, tmp_path / "run")
    assert (result.best_step, result.steps) == (10, 12)
    best = Adapter.load(tmp_path / "run/checkpoints/step-00000010/adapter")
    assert best.same_weights(Adapter.load(result.adapter))
    last = Adapter.load(tmp_path / "run/checkpoints/step-00000012/adapter")
    assert not best.same_weights(last)
