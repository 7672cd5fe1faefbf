"""The sides of `bench/train.py`: sideroad's own step, and the table of all sides with how each lays rows out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from cells import Batches
from train_peers import ALPHA, RANK, RATE, Made, peft_side, trl_packing_side, trl_padding_free_side, trl_side

from sideroad.attaching import attach
from sideroad.base.config import BaseConfig
from sideroad.base.loading import Base, load_base
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.data.encode import Encoded
from sideroad.kernels.isolation import choose_route
from sideroad.train.choosing import choose_execution
from sideroad.train.progress import Progress
from sideroad.train.settings import OptimConfig, TrainConfig
from sideroad.train.steps import Stepper
from sideroad.train.watchdog import Watchdog

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STRETCH = 16
"""Batches within which a peer that sorts by length sorts."""

Maker = Callable[[Base, Batches, ExitStack], Made]


@dataclass(frozen=True)
class Side:
    """One way of training on a cell's rows.

    Attributes:
        make: puts an adapter on a base of its own and returns its step.
        peer: whom sideroad is compared with.
        sorts: its timed batches are made of rows of similar length.
        regroups: a turn of it holds other rows than the same turn of sideroad's, so only whole runs compare.
        modules: code that it loads; memory counts without it.
    """

    what: str
    make: Maker
    peer: bool = True
    sorts: bool = False
    regroups: bool = False
    modules: tuple[str, ...] = ()


def sideroad_side(base: Base, batches: Batches, stack: ExitStack, *, config: TrainConfig) -> Made:
    """The step of `sideroad train`.

    Args:
        base: its model gets the adapter.
        batches: one for each turn.
        stack: holds the model's fast path in force until it closes.
        config: whether the path is fast, and compiled.
    """
    handle = attach(base.model, AdapterConfig(method=LoraMethod(rank=RANK, alpha=ALPHA)), seed=0)
    route = choose_route(base.model)
    execution = choose_execution(base.model, route, config, pad_id=base.tokenizer.pad_token_id)
    stack.enter_context(execution.running())
    parameters = handle.parameters("default")
    dtype = str(base.dtype).removeprefix("torch.")
    watchdog = Watchdog(base.model.config.vocab_size, dtype, parameters)
    optim = OptimConfig(lr=RATE, schedule="constant", warmup_ratio=0.0)
    stepper = Stepper(
        base.model, parameters, optim, watchdog, loss_of=execution.loss_of, steps=len(batches), seed=0
    )
    state = {"progress": Progress()}

    def step(turn: int) -> tuple[float, int]:
        rows = batches[turn]
        batch = execution.lay_out(rows)
        prepared = stepper.prepare(state["progress"], [batch], [[row.source for row in rows]])
        stepper.apply(prepared)
        state["progress"] = prepared.progress
        return prepared.loss, batch.real_tokens

    return step, {**execution.to_json(), "notes": list(execution.notes)}


_EAGER = partial(sideroad_side, config=TrainConfig(compile="off"))
_COMPILED = partial(sideroad_side, config=TrainConfig(compile="on"))
OURS = ("sideroad", "sideroad-compiled")
_PEFT, _TRL, _COMPILER = ("peft",), ("peft", "datasets", "trl.trainer.sft_trainer"), ("torch._inductor.compile_fx",)
SIDES: dict[str, Side] = {
    "a": Side("bare PEFT loop, random batches", peft_side, modules=_PEFT),
    "b": Side("bare PEFT loop, rows sorted by length", peft_side, sorts=True, regroups=True, modules=_PEFT),
    "c": Side("TRL SFTTrainer, its defaults", trl_side, modules=_TRL),
    "d1": Side("TRL, fp32, padding_free", trl_padding_free_side, modules=_TRL),
    "d2": Side("TRL, fp32, packing", trl_packing_side, regroups=True, modules=_TRL),
    "sideroad": Side("sideroad", _EAGER, peer=False),
    "sideroad-compiled": Side("sideroad, pieces compiled", _COMPILED, peer=False, modules=_COMPILER),
}


def maker(side: str, compiled: bool) -> Maker:
    """Return what makes a side; `compiled` decides about the pieces of `sideroad`."""
    return _COMPILED if side == "sideroad" and compiled else SIDES[side].make


def load(base: str, dtype: str) -> Base:
    """Load a base onto the CPU in the dtype asked for."""
    return load_base(BaseConfig(model=base, device="cpu"), dtype=DTYPES[dtype])


def arrange(side: str, batches: Sequence[Sequence[Encoded]], warm_up: int) -> list[list[Encoded]]:
    """Return the batches as a side takes them: the same rows, and the same ones to warm up with."""
    given = [list(rows) for rows in batches]
    if not SIDES[side].sorts:
        return given
    timed = given[warm_up:]
    found = given[:warm_up]
    for begin in range(0, len(timed), STRETCH):
        found += _sorted(timed[begin : begin + STRETCH])
    return found


def _sorted(batches: Sequence[Sequence[Encoded]]) -> list[list[Encoded]]:
    """The rows of a stretch in batches of the same sizes and of similar length, in random order."""
    rows = sorted((row for each in batches for row in each), key=len)
    supply = iter(rows)
    made = [[next(supply) for _ in each] for each in batches]
    random.Random(0).shuffle(made)
    return made
