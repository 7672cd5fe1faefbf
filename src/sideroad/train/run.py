"""One run, from a recipe to an adapter on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sideroad.adapter import Adapter
from sideroad.config import FROM_DATA, FROM_WEIGHT, init_name
from sideroad.errors import CheckpointError
from sideroad.kernels.isolation import packing
from sideroad.kinds.experts import layer_at
from sideroad.methods.budget import budget_for
from sideroad.mixtures import stacked_parameters
from sideroad.train import checkpoint
from sideroad.train.environment import differences
from sideroad.train.events import Event, Finished, Note, Planned, Result
from sideroad.train.fingerprint import differing, recipe_values
from sideroad.train.finish import finish, read_result
from sideroad.train.interrupts import Interrupted
from sideroad.train.loop import Loop
from sideroad.train.progress import Progress
from sideroad.train.recipe import Recipe, dump_recipe, load_recipe
from sideroad.train.restoring import put_back
from sideroad.train.run_directory import RunDirectory, to_json, write_atomically
from sideroad.train.seeds import derive
from sideroad.train.setup import NAME, Setup, prepare
from sideroad.train.steps import LARGEST_SCALE, Stepper
from sideroad.train.trackers import check_installed, open_trackers
from sideroad.train.watchdog import Watchdog

Emit = Callable[[Event], None]


def train(
    recipe: Recipe,
    run: str | Path,
    *,
    resume: bool = False,
    offline: bool = False,
    on_event: Emit | None = None,
) -> Result:
    """Train an adapter as `recipe` says and leave everything about it in the directory `run`.

    The base's weights are never changed, and the caller's random state is as it was. The model is in train mode while
    training, so dropout of the base's own (GPT-2 has some) acts besides the adapter's, as in other trainers.

    Args:
        resume: go on from the newest checkpoint in `run`; on a CPU the result then equals, bit for bit, that of a run
            never stopped. Without a checkpoint it starts from the beginning; a finished run gives its result.
        offline: never use the network.
        on_event: receives every event; an exception it raises ends the run, which stays resumable.
    Raises:
        ConfigError, DataError, BaseModelError, TargetError: before anything is written.
        CheckpointError: `run` is in use, holds another run, or its newest checkpoint is torn or foreign.
        TrainingError: the run cannot go on; the last good checkpoint is intact.
        Interrupted: Ctrl-C (a KeyboardInterrupt); a checkpoint of the last complete step was written.
    """
    emit = on_event or _ignore
    place = RunDirectory(Path(run))
    check_installed(recipe.train.trackers)
    with ExitStack() as stack:
        stack.enter_context(place.held(resume=resume))
        if resume and (result := _finished(place, recipe)):
            emit(Note(f"this run is finished; its adapter is in {result.adapter}"))
            emit(Finished(result))
            return result
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        checkpoint.clean(place.checkpoints)
        begun = resume and bool(checkpoint.listed(place.checkpoints))
        recorded = place.read_json(place.environment) if begun else None
        adapter = _begun(place, recipe) if begun else None
        setup = prepare(recipe, recorded, offline=offline, emit=emit, folder=place.path, begun=adapter)
        if setup.material.execution.store is not None:
            stack.callback(setup.material.execution.store.close)
        stack.enter_context(packing(setup.base.model, setup.route))  # scoring at the end packs too
        if resume and not begun:
            emit(Note(f"{place.path} has no checkpoint yet; starting from the beginning"))
        if begun and recorded is None:
            emit(Note(f"{place.environment} is gone; on a changed machine the result may differ in its last bits"))
        loop = _loop(place, recipe, setup, emit, stack, begun=begun)
        _record_start(place, recipe, setup, recorded, emit)
        try:
            with setup.material.execution.running():
                loop.go()
            result = finish(place, recipe, setup, loop, emit)
        except KeyboardInterrupt as interrupt:
            path = loop.save()
            raise Interrupted(place.path, loop.progress.step, path) from interrupt
        emit(Finished(result))
        return result


def _ignore(event: Event) -> None:
    pass


def _finished(place: RunDirectory, recipe: Recipe) -> Result | None:
    result = read_result(place)
    if result is None:
        return None
    changed = differing(recipe_values(load_recipe(place.recipe)), recipe_values(recipe), "recipe")
    if changed:
        listing = "".join(f"\n  - {line}" for line in changed)
        raise CheckpointError(
            f"the run in {place.path} is finished, and the recipe has changed since:{listing}\n"
            "Start anew in another --run."
        )
    return result


def _begun(place: RunDirectory, recipe: Recipe) -> Adapter | None:
    """The adapter of the run being resumed, where it was started from data: those need not be looked at again."""
    if init_name(recipe.adapter.method.init) not in FROM_DATA:
        return None
    return checkpoint.load_adapter(place.checkpoints, checkpoint.step_of(checkpoint.listed(place.checkpoints)[-1]))


def _record_start(
    place: RunDirectory, recipe: Recipe, setup: Setup, recorded: dict[str, object] | None, emit: Emit
) -> None:
    """Write recipe.yaml, and env.json at the beginning; on a resume, tell what about the machine has changed."""
    write_atomically(place.recipe, dump_recipe(recipe))
    if recorded is None:
        write_atomically(place.environment, to_json(setup.environment) + "\n")
        return
    for line in differences(recorded, setup.environment):
        emit(Note(f"not the environment this run began in: {line}; the result may differ in its last bits"))


def _loop(place: RunDirectory, recipe: Recipe, setup: Setup, emit: Emit, stack: ExitStack, *, begun: bool) -> Loop:
    model, parameters = setup.base.model, setup.attached.parameters(NAME)
    plan = list(setup.order.steps(recipe.train))
    watchdog = Watchdog(setup.vocabulary, setup.environment["dtype"], parameters)
    seed = derive(recipe.seed, "dropout")
    execution = setup.material.execution
    stepper = Stepper(
        model,
        parameters,
        recipe.optim,
        watchdog,
        loss_of=execution.loss_of,
        steps=len(plan),
        seed=seed,
        budget=budget_for(setup.attached.deltas(NAME), recipe.adapter.method, len(plan)),
        looked_up=_zero_a(setup, recipe),
        experts=stacked_parameters(setup.attached.survey(), parameters),
    )
    restored = _restore(place, setup, stepper, watchdog, emit) if begun else None
    fresh = Progress(loss_scale=LARGEST_SCALE if setup.base.dtype == torch.float16 else 1.0)
    progress = restored or fresh
    place.cut_metrics(progress.step, validated=progress.validated)
    examples = setup.material.examples
    emit(
        Planned(
            steps=len(plan),
            start=progress.step,
            epochs=recipe.train.epochs,
            examples=len(examples),
            validation_examples=len(setup.material.validation_examples),
            tokens=sum(len(examples[index].ids) for step in plan for batch in step for index in batch),
            trained_tokens=sum(examples[index].trained_tokens for step in plan for batch in step for index in batch),
            saved_tokens=setup.saved_tokens,
            packed=setup.route.isolates,
            trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
            device=setup.environment["device"],
            dtype=setup.environment["dtype"],
        )
    )
    trackers = open_trackers(recipe.train.trackers, place.path, recipe.model_dump(mode="json"), progress.step)
    for tracker in trackers:
        stack.callback(tracker.close)
    return Loop(
        place,
        setup.material,
        stepper,
        watchdog,
        recipe.train,
        progress,
        steps=len(plan),
        restored=restored is not None,
        emit=emit,
        trackers=trackers,
    )


def _zero_a(setup: Setup, recipe: Recipe) -> set[str]:
    """Paths of the embeddings whose A starts at zero: those of LoRA with a start from neither weights nor data."""
    if recipe.adapter.method.variant != "lora" or init_name(recipe.adapter.method.init) in (*FROM_WEIGHT, *FROM_DATA):
        return set()
    model, paths = setup.base.model, setup.attached.paths(NAME)
    return {path for path in paths if isinstance(layer_at(model, path), nn.Embedding)}


def _restore(place: RunDirectory, setup: Setup, stepper: Stepper, watchdog: Watchdog, emit: Emit) -> Progress:
    """Put the newest checkpoint into the model and the optimizer."""
    found = checkpoint.read(checkpoint.listed(place.checkpoints)[-1], setup.material.fingerprint)
    put_back(setup.attached, stepper, found.adapter, found.optimizer)
    watchdog.last_good = found.path
    best = found.progress.best_step
    if best is not None and not (place.checkpoints / checkpoint.name_of(best)).is_dir():
        emit(Note(f"the best checkpoint, {checkpoint.name_of(best)}, is gone; the best is looked for anew from here"))
        return replace(found.progress, best_step=None, best_loss=None, waiting=0)
    return found.progress
