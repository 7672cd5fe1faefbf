"""Everything a run needs before its first step: base, data, adapter, packing, order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sideroad.adapter import Adapter, BaseRecord
from sideroad.attaching import Attached, attach
from sideroad.base.loading import Base, load_base
from sideroad.data.batches import plan_epoch
from sideroad.data.dataset import Loaded, load_data
from sideroad.data.encode import Encoded
from sideroad.data.findings import refuse
from sideroad.data.sharing import group
from sideroad.errors import ConfigError, TrainingError
from sideroad.kernels.frozen_part import blocks_below
from sideroad.kernels.isolation import PackingRoute, choose_route
from sideroad.mixtures import mixture_notes
from sideroad.train.choosing import choose_execution, short_row
from sideroad.train.environment import describe
from sideroad.train.events import Event, Note
from sideroad.train.execution import Execution
from sideroad.train.fingerprint import fingerprint
from sideroad.train.init_batches import init_batches
from sideroad.train.loop import Material
from sideroad.train.order import Order
from sideroad.train.recipe import Recipe
from sideroad.train.run_directory import FROZEN_FILE
from sideroad.train.seeds import derive
from sideroad.train.speed import Work, expected_seconds, measure_limit, work_of

Emit = Callable[[Event], None]

NAME = "default"
"""The adapter's name on the model while it trains."""


@dataclass(frozen=True)
class Setup:
    """A run ready to begin.

    `vocabulary` is the number of logits the model gives; `environment` goes into env.json; `limit` are the operations a
    second that this machine's matrix products reach; `saved_tokens` is what shared beginnings save over the whole run.
    """

    base: Base
    data: Loaded
    attached: Attached
    route: PackingRoute
    order: Order
    material: Material
    vocabulary: int
    environment: Mapping[str, Any]
    work: Work
    limit: float
    saved_tokens: int


def prepare(
    recipe: Recipe,
    recorded: Mapping[str, Any] | None,
    *,
    offline: bool,
    emit: Emit,
    folder: Path | None = None,
    begun: Adapter | None = None,
) -> Setup:
    """Load the base and the data, check both, attach a fresh adapter, and decide about packing.

    Args:
        recorded: env.json of the run being resumed, whose probed dtype is used again; None for a new run.
        folder: for a large temporary file, if one is needed; the current directory by default.
        begun: the adapter of the run being resumed, attached as it is instead of a fresh one.
    """
    base = _load_base(recipe, recorded, offline=offline, emit=emit)
    data = _load_data(recipe, base, offline=offline, emit=emit)
    attached = _attach(recipe, base, data, begun)
    for note in mixture_notes(attached.survey(), recipe.adapter, attached.paths(NAME)).lines:
        emit(Note(note))
    if recipe.train.gradient_checkpointing:
        _enable_checkpointing(base)
    route = _choose_route(recipe, base, recorded, emit)
    packed = route.isolates
    parameters = attached.parameters(NAME)
    examples = data.train.examples
    validation = data.validation.examples if data.validation else ()
    tokens, trained = _expected_tokens(recipe, data)
    # what comes but once is not worth keeping
    again = [*(examples if tokens > sum(data.train.lengths) else ()), *validation]
    below = blocks_below(base.model, short_row(base.model))
    count = sum(one.numel() for one in parameters.values())
    limit = measure_limit(base.device, base.dtype, base.model)
    seconds = expected_seconds(work_of(base.model, count, below), limit, tokens, trained)
    execution = _choose_execution(recipe, base, route, seconds, recorded, repeats=bool(again))
    execution = execution.keeping(again, recipe.train, (folder or Path.cwd()) / FROZEN_FILE)
    long = sum(1 for one in examples if execution.reach and len(one) > execution.reach)
    if long:
        emit(Note(f"{long} of {len(examples)} rows pass the model's window ({execution.reach}) and share nothing"))
    if recorded is not None and "execution" not in recorded:
        emit(Note("an older sideroad began this run; it goes on on the plain path, as it began"))
    for note in execution.notes:
        emit(Note(note))
    kept_below = execution.store is not None and len(again) > len(validation)
    work = work_of(base.model, count, below, kept=kept_below)
    order = Order(
        data.train.lengths,
        recipe.optim,
        seed=derive(recipe.seed, "data"),
        packed=packed,
        ids=[example.ids for example in examples] if execution.shares else None,
    )
    material = Material(
        model=base.model,
        parameters=parameters,
        snapshot=lambda: _snapshot(attached, base),
        examples=examples,
        validation_examples=validation,
        order=order,
        validation=_validation_plan(recipe, data, packed=packed, shared=execution.shares),
        execution=execution,
        device=base.device,
        fingerprint=fingerprint(
            recipe,
            base=base.identity.sha256,
            train=data.train.sha256,
            validation=data.validation.sha256 if data.validation else None,
        ),
    )
    environment = describe(
        device=base.device,
        dtype=base.dtype,
        seed=recipe.seed,
        packing={"route": route.kind, "reason": route.reason},
        execution=execution.to_json(),
        base=base.identity.to_json(),
    )
    saved = _saved_tokens(recipe, order, execution, examples)
    return Setup(base, data, attached, route, order, material, _vocabulary(base), environment, work, limit, saved)


def _load_base(recipe: Recipe, recorded: Mapping[str, Any] | None, *, offline: bool, emit: Emit) -> Base:
    dtype = getattr(torch, recorded["dtype"]) if recorded else None
    base = load_base(recipe.base, offline=offline, dtype=dtype, on_progress=emit)
    for note in base.notes:
        emit(Note(note))
    return base


def _load_data(recipe: Recipe, base: Base, *, offline: bool, emit: Emit) -> Loaded:
    longest = getattr(base.model.config, "max_position_embeddings", None)
    data = load_data(recipe.data, base.tokenizer, root=Path.cwd(), offline=offline, max_positions=longest)
    refuse(data.findings)
    if recipe.data.chat_template is not None:
        # From here on it is the model's own: answers end where it ends a turn, and the adapter carries it.
        base.tokenizer.chat_template = Path(recipe.data.chat_template).read_text(encoding="utf-8")
    for finding in data.findings:
        emit(Note(str(finding)))
    return data


def _attach(recipe: Recipe, base: Base, data: Loaded, begun: Adapter | None) -> Attached:
    """Put the adapter on the base: a fresh one, from data where its start asks for them, or the one of a begun run."""
    if begun is not None:
        return attach(base.model, begun, NAME, trainable=True)
    batches = init_batches(
        recipe.adapter.method.init,
        data.train.examples,
        size=recipe.optim.batch_size or 8,
        pad_id=base.tokenizer.pad_token_id or 0,
        seed=derive(recipe.seed, "init data"),
        device=base.device,
    )
    seed = derive(recipe.seed, "init")
    return attach(base.model, recipe.adapter, NAME, seed=seed, trainable=True, batches=batches)


def _validation_plan(recipe: Recipe, data: Loaded, *, packed: bool, shared: bool) -> list[tuple[int, ...]]:
    """Micro-batches of the validation set, the same at every validation; empty without one."""
    if data.validation is None:
        return []
    plan = plan_epoch(
        data.validation.lengths,
        batch_size=recipe.optim.batch_size,
        max_tokens=recipe.optim.batch_tokens,
        group_by_length=True,
        padded=not packed,
    )
    # the sum does not care who stands beside whom, so those that share most do
    return group(plan, [example.ids for example in data.validation.examples]) if shared else plan


def _expected_tokens(recipe: Recipe, data: Loaded) -> tuple[int, int]:
    """About how many tokens a run goes through, and how many of them are trained."""
    lengths, optim = data.train.lengths, recipe.optim
    total, trained = sum(lengths), sum(example.trained_tokens for example in data.train.examples)
    step = optim.accumulate * (optim.batch_tokens or (optim.batch_size or 1) * total / len(lengths))
    tokens = min(recipe.train.epochs * total, (recipe.train.max_steps or math.inf) * step)
    return round(tokens), round(tokens * trained / total)


def _saved_tokens(recipe: Recipe, order: Order, execution: Execution, examples: Sequence[Encoded]) -> int:
    """Tokens that shared beginnings save over the run."""
    if not execution.shares:
        return 0
    batches = (batch for step in order.steps(recipe.train) for batch in step)
    return sum(execution.saved_tokens([examples[index] for index in batch]) for batch in batches)


def _choose_route(recipe: Recipe, base: Base, recorded: Mapping[str, Any] | None, emit: Emit) -> PackingRoute:
    """How packed rows run; kind `none` for padding. A resumed run keeps to padding if it began so."""
    wanted = recipe.data.packing
    if wanted == "off":
        return PackingRoute("none", "data.packing is off")
    before = recorded["packing"] if recorded else None
    if before and before["route"] == "none":
        return PackingRoute("none", before["reason"])
    route = choose_route(base.model)
    if route.isolates:
        return route
    if wanted == "on" or before:
        raise TrainingError(
            f"data.packing: {wanted} needs packed sequences kept apart, and here they are not: {route.reason}. "
            "Set data.packing: off to pad instead."
        )
    emit(Note(f"not packing, examples are padded in groups of like length: {route.reason}"))
    return route


def _choose_execution(
    recipe: Recipe,
    base: Base,
    route: PackingRoute,
    seconds: float,
    recorded: Mapping[str, Any] | None,
    *,
    repeats: bool,
) -> Execution:
    """A run that an older version began goes on on the plain path, as it began."""
    older = recorded is not None and "execution" not in recorded
    return choose_execution(
        base.model,
        route,
        recipe.train.model_copy(update={"fast": False, "compile": "off"}) if older else recipe.train,
        pad_id=base.tokenizer.pad_token_id,
        share=recipe.data.share_prefixes == "auto",
        repeats=repeats,
        seconds=seconds,
        recorded=None if recorded is None else recorded.get("execution"),
    )


def _enable_checkpointing(base: Base) -> None:
    if not getattr(base.model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"train.gradient_checkpointing: {type(base.model).__name__} cannot recompute its activations; "
            "set it to false"
        )
    # Not reentrant: the embedding is frozen, so a block's input has no gradient for the reentrant form to hang on to.
    if hasattr(base.model, "activation_checkpointing_enable"):
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})


def _vocabulary(base: Base) -> int:
    head = base.model.get_output_embeddings()
    weight = head.weight if head is not None else base.model.get_input_embeddings().weight
    return int(weight.shape[0])


def _snapshot(attached: Attached, base: Base) -> Adapter:
    identity = base.identity
    record = BaseRecord(identity.name, identity.source, identity.sha256, identity.licence)
    return replace(attached.adapter(NAME), base=record)
