"""The blocks below the first adapted layer: found, run alone, and skipped when what they give is known already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.kernels.live import foreign_hook
from sideroad.kernels.standing_in import standing_in
from sideroad.modes import cuda_devices, in_eval_mode, in_train_mode
from sideroad.route import deltas_of, walk


@dataclass(frozen=True)
class FrozenPart:
    """The lower blocks of a model, which no training changes.

    Attributes:
        blocks: those below the first adapted layer, in order; the block behind them is `first`.
        tuples: whether a block answers with a tuple whose first entry is the hidden state.
        above: the other blocks, from the first adapted one on.
        width, dtype: of a hidden state.
    """

    blocks: tuple[nn.Module, ...]
    first: nn.Module
    tuples: bool
    above: tuple[nn.Module, ...]
    width: int
    dtype: torch.dtype

    @torch.no_grad()
    def run(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """Return what enters the first adapted block, [rows, length, width]; nothing above is computed."""
        with standing_in([(self.first, _stop)]):
            try:
                model(**arguments)
            except _Reached as reached:
                return reached.hidden
        raise AssertionError("the first adapted block was not called")

    @contextmanager
    def skipped(self, hidden: Tensor) -> Iterator[None]:
        """Let the model go on from `hidden` without computing the blocks.

        A forward pass is enough: nothing of the lower blocks is kept, so a backward pass repeats nothing of them.
        """

        def answer(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return (given,) if self.tuples else given

        def last(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.tuples else hidden

        with standing_in([*((block, answer) for block in self.blocks[:-1]), (self.blocks[-1], last)]):
            yield


def find_frozen_part(model: nn.Module, arguments: Mapping[str, Any]) -> FrozenPart | str | None:
    """Return the blocks below the first adapted layer, None if there is none, or say why they cannot be skipped.

    The model is run on a short row, without gradients: to see in which block the first adapted layer is called, whether
    skipping the blocks below gives the very same logits, and whether they compute the same in training under any seed.
    """
    with torch.no_grad(), in_eval_mode(model):
        try:
            blocks, index, tuples = _first_adapted(model, arguments)
        except LookupError:
            return None
        if index == 0:
            return None
        if any(foreign_hook(block) for block in blocks):
            return "a block carries somebody else's hook"
        part = FrozenPart(tuple(blocks[:index]), blocks[index], tuples, tuple(blocks[index:]), 0, torch.float32)
        try:
            expected = model(**arguments).logits
            hidden = part.run(model, arguments)
            if not all(torch.equal(hidden, again) for again in _in_training(model, part, arguments)):
                return "what enters the first adapted block is drawn at random in training"
            with part.skipped(hidden):
                found = model(**arguments).logits
        except Exception as error:  # a model whose blocks pass on more than a hidden state
            return f"{type(model).__name__} cannot go on from a block's input: {type(error).__name__}"
    if not torch.equal(found, expected):
        return "blocks pass on more than their hidden state"
    return replace(part, width=hidden.shape[-1], dtype=hidden.dtype)


def _in_training(model: nn.Module, part: FrozenPart, arguments: Mapping[str, Any]) -> list[Tensor]:
    """What enters the first adapted block in training mode, under three seeds."""
    found = []
    for seed in range(3):
        with in_train_mode(model), torch.random.fork_rng(devices=cuda_devices(model)):
            torch.manual_seed(seed)
            found.append(part.run(model, arguments))
    return found


def blocks_below(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[nn.Module, ...]:
    """Return the blocks below the first adapted layer, which get no gradient; none where that cannot be told."""
    with torch.no_grad(), in_eval_mode(model):
        try:
            blocks, index, _ = _first_adapted(model, arguments)
        except LookupError:
            return ()
    return tuple(blocks[:index])


class _Reached(Exception):  # noqa: N818  (no error: the way out of a forward pass)
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


def _first_adapted(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Sequence[nn.Module], int, bool]:
    """Blocks, the number of the one in which the first adapted layer is called, and whether they answer with tuples."""
    lists = [list(module) for _, module in walk(model) if isinstance(module, nn.ModuleList) and len(module) > 1]
    blocks = next((found for found in lists if len({type(block) for block in found}) == 1), None)
    if blocks is None:
        raise LookupError("the model has no list of like blocks")
    adapted = [module for _, module in walk(model) if deltas_of(module) is not None]
    reached: list[int] = []
    forms: list[bool] = []
    entered: list[int] = []

    def enter(index: int) -> Any:
        return lambda *_: entered.append(index)

    def reach(*_: Any) -> None:
        reached.append(entered[-1] if entered else -1)

    handles = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks)]
    handles += [module.register_forward_pre_hook(reach) for module in adapted]
    handles += [blocks[0].register_forward_hook(lambda _m, _i, output: forms.append(isinstance(output, tuple)))]
    try:
        model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    if not forms or not reached or reached[0] < 0:
        raise LookupError("a layer before the first block is adapted")
    return blocks, reached[0], forms[0]
