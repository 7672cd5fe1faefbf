"""The end of a run: which weights are kept, what they are worth, and what is written about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import sideroad
from sideroad.errors import CheckpointError
from sideroad.files import replace_file
from sideroad.init import starts_as_base
from sideroad.train import checkpoint
from sideroad.train.evaluation import Comparison, Scores, evaluate
from sideroad.train.events import Answers, Evaluating, Event, Kept, Result
from sideroad.train.loop import Loop
from sideroad.train.recipe import Recipe, dump_recipe
from sideroad.train.report import CardFacts, DataFile, loss_plot, model_card, samples_page
from sideroad.train.restoring import put_back
from sideroad.train.run_directory import RunDirectory, finite_or_null, to_json, write_atomically
from sideroad.train.setup import Setup
from sideroad.train.speed import Speed, speed_of

Emit = Callable[[Event], None]


def finish(place: RunDirectory, recipe: Recipe, setup: Setup, loop: Loop, emit: Emit) -> Result:
    """Choose the weights to keep, score them, write everything about them, and mark the run finished by result.json.

    The adapter is on disk before anything is generated, so an interrupt while scoring loses only scores, and a resume
    takes them again.
    """
    _choose_weights(place, recipe, setup, loop)
    result = _result(place, recipe, setup, loop)
    _save_adapter(recipe, setup, result, None)
    comparison = _compare(recipe, setup, _known_losses(recipe, loop), emit)
    if comparison is not None:
        result = replace(result, scores=_scores(comparison), samples=_samples(comparison))
        if comparison.adapted.metrics:
            scored = comparison.adapted
            loop.record({"step": result.kept_step, "validation_loss": scored.loss, **scored.metrics})
        if result.samples:
            write_atomically(place.samples, samples_page(comparison, f"Samples of {place.path.resolve().name}"))
        _save_adapter(recipe, setup, result, comparison)
    replace_file(place.plot, loss_plot(_records(place), place.path.resolve().name), CheckpointError)
    write_atomically(place.result, to_json(_plain(result)) + "\n")
    return result


def read_result(place: RunDirectory) -> Result | None:
    """The result of a finished run, or None while it is not finished."""
    values = place.read_json(place.result)
    if values is None or not place.adapter.is_dir():
        return None
    try:
        samples = tuple(Answers(**sample) for sample in values.pop("samples"))
        speed = values.pop("speed", None)
        return Result(
            **values,
            speed=None if speed is None else Speed(**speed),
            samples=samples,
            run=place.path,
            adapter=place.adapter,
        )
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{place.result} is of another sideroad ({error}); remove it and resume") from error


def _records(place: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.metrics.read_text(encoding="utf-8").splitlines()]


def _choose_weights(place: RunDirectory, recipe: Recipe, setup: Setup, loop: Loop) -> None:
    best = loop.progress.best_step
    if recipe.train.keep == "last" or best is None or best == loop.progress.step:
        return
    adapter = checkpoint.load_adapter(place.checkpoints, best)
    if adapter is None:
        raise CheckpointError(f"train.keep: best wants step {best}, whose checkpoint is gone from {place.checkpoints}")
    put_back(setup.attached, loop.stepper, adapter, checkpoint.load_tensors(place.checkpoints, best))


def _result(place: RunDirectory, recipe: Recipe, setup: Setup, loop: Loop) -> Result:
    progress = loop.progress
    kept: Kept = recipe.train.keep
    return Result(
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
        speed=speed_of(_records(place), setup.work, setup.limit),
    )


def _known_losses(recipe: Recipe, loop: Loop) -> dict[str, float | None]:
    """Losses of the base and of the kept weights that validation has taken already, bit for bit; None: not taken."""
    progress = loop.progress
    if recipe.train.keep == "best":
        kept = progress.best_loss
    else:
        kept = progress.last_validation_loss if progress.validated == progress.step else None
    fresh = progress.first_validation_loss if starts_as_base(recipe.adapter.method.init) else None
    return {"base": fresh, "adapted": kept}


def _compare(recipe: Recipe, setup: Setup, known: Mapping[str, float | None], emit: Emit) -> Comparison | None:
    dataset = setup.data.validation
    if dataset is None:
        return None

    def scores(who: Literal["base", "adapted"]) -> Scores:
        """Score what acts now, telling of each answer."""
        begun = Evaluating(who, len(dataset.examples))
        emit(begun)
        return evaluate(
            setup.base,
            dataset,
            recipe.evaluate,
            recipe.data,
            packed=setup.route.isolates,
            seed=recipe.seed,
            known_loss=known[who],
            on_answers=lambda answered, asked: emit(replace(begun, answered=answered, asked=asked)),
        )

    with setup.attached.disabled():
        base = scores("base")
    return Comparison(base, scores("adapted"))


def _scores(comparison: Comparison) -> dict[str, dict[str, float]]:
    return {"base": comparison.base.values, "adapted": comparison.adapted.values}


def _samples(comparison: Comparison) -> tuple[Answers, ...]:
    pairs = zip(comparison.base.samples, comparison.adapted.samples, strict=True)
    return tuple(Answers(one.source, one.prompt, one.reference, one.output, other.output) for one, other in pairs)


def _save_adapter(recipe: Recipe, setup: Setup, result: Result, comparison: Comparison | None) -> None:
    portable = _portable(recipe, setup)
    files = _data_files(setup)
    adapter, lowest = setup.material.snapshot(), result.best_validation_loss
    manifest: Mapping[str, Any] = finite_or_null(
        {
            "data": [asdict(file) for file in files],
            "prompt": {
                "system": recipe.data.system,
                "chat_template": setup.base.tokenizer.chat_template if recipe.data.chat_template else None,
            },
            "recipe": portable.model_dump(mode="json"),
            "training": {
                "steps": result.steps,
                "kept": result.kept,
                "kept_step": result.kept_step,
                "validation_loss": lowest if result.kept == "best" else result.last_validation_loss,
            },
            "scores": result.scores,
        }
    )
    identity, folded = setup.base.identity, adapter.folded()
    card = model_card(
        CardFacts(
            name=result.run.resolve().name,
            base_name=identity.name,
            base_reference=identity.name,
            base_source=identity.source,
            base_sha256=identity.sha256,
            base_licence=identity.licence,
            data=files,
            recipe=dump_recipe(portable),
            parameters=folded.parameters,
            trained=sum(one.numel() for one in setup.material.parameters.values()),
            adapted_layers=len(folded.paths),
            kept=f"{'best validation, step' if result.kept == 'best' else 'last step,'} {result.kept_step}",
            scores=comparison,
            version=sideroad.__version__,
        )
    )
    replace(adapter, manifest=manifest).save(result.adapter, card=card)


def _portable(recipe: Recipe, setup: Setup) -> Recipe:
    """The recipe without this machine's paths, for an adapter that travels."""
    data = recipe.data
    template = Path(data.chat_template).name if data.chat_template else None
    local = {
        "train": tuple(_name(source) for source in data.train_sources),
        "validation": _name(data.validation) if data.validation else None,
        "chat_template": template,
    }
    base = recipe.base.model_copy(update={"model": setup.base.identity.name})
    return recipe.model_copy(update={"base": base, "data": data.model_copy(update=local)})


def _name(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def _data_files(setup: Setup) -> tuple[DataFile, ...]:
    sets = (("training", setup.data.train), ("validation", setup.data.validation))
    return tuple(
        DataFile(name, role, sha256)
        for role, dataset in sets
        if dataset is not None
        for name, sha256 in dataset.files.items()
    )


def _plain(result: Result) -> dict[str, Any]:
    values = asdict(result)
    del values["run"], values["adapter"]
    return values
