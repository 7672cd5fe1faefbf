"""The end of a run: which weights are kept, what they are worth, and what is written about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from sideroad.errors import CheckpointError
from sideroad.train import checkpoint
from sideroad.train.events import Event, Kept, Result
from sideroad.train.loop import Loop
from sideroad.train.recipe import Recipe
from sideroad.train.run_directory import RunDirectory, finite_or_null, to_json, write_atomically
from sideroad.train.setup import NAME, Setup

Emit = Callable[[Event], None]


def finish(place: RunDirectory, recipe: Recipe, setup: Setup, loop: Loop, emit: Emit) -> Result:
    """Choose the weights to keep, write `adapter/`, score it, and mark the run finished with result.json.

    The adapter is on disk before anything is generated, so an interrupt while scoring loses only scores.
    """
    progress = loop.progress
    kept: Kept = recipe.train.keep
    if kept == "best" and progress.best_step is not None and progress.best_step != progress.step:
        best = checkpoint.load_adapter(place.checkpoints, progress.best_step)
        if best is None:
            raise CheckpointError(
                f"train.keep: best wants step {progress.best_step}, whose checkpoint is gone from {place.checkpoints}"
            )
        setup.attached.load(NAME, best)
    result = Result(
        run=place.path,
        adapter=place.adapter,
        steps=progress.step,
        kept=kept,
        kept_step=progress.best_step if kept == "best" and progress.best_step is not None else progress.step,
        loss=progress.loss,
        first_validation_loss=progress.first_validation_loss,
        last_validation_loss=progress.last_validation_loss,
        best_validation_loss=progress.best_loss,
        best_step=progress.best_step,
        stopped_early=progress.stopped,
        seconds=progress.seconds,
    )
    adapter = replace(setup.material.snapshot(), manifest=_manifest(recipe, setup, result))
    adapter.save(place.adapter)
    write_atomically(place.result, to_json(_plain(result)) + "\n")
    return result


def read_result(place: RunDirectory) -> Result | None:
    """The result of a finished run, or None while it is not finished."""
    values = place.read_json(place.result)
    if values is None or not place.adapter.is_dir():
        return None
    try:
        return Result(**{**values, "run": place.path, "adapter": place.adapter})
    except TypeError as error:
        raise CheckpointError(
            f"{place.result} is not a result this sideroad wrote ({error}); remove it and resume"
        ) from error


def _plain(result: Result) -> dict[str, Any]:
    values = asdict(result)
    del values["run"], values["adapter"]
    return values


def _manifest(recipe: Recipe, setup: Setup, result: Result) -> Mapping[str, Any]:
    data = setup.data
    manifest: dict[str, Any] = {
        "data": {
            "train": {"sha256": data.train.sha256, "examples": len(data.train.examples)},
            "validation": {"sha256": data.validation.sha256, "examples": len(data.validation.examples)}
            if data.validation
            else None,
        },
        "prompt": {"system": recipe.data.system},
        "recipe": recipe.model_dump(mode="json"),
        "training": _plain(replace(result, scores={})),
        "scores": result.scores,
    }
    plain: Mapping[str, Any] = finite_or_null(manifest)
    return plain
