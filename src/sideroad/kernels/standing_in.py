"""Another forward in the place of a module's own, for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from sideroad.route import deltas_of

Forward = Callable[..., Any]


@contextmanager
def standing_in(places: Sequence[tuple[nn.Module, Forward]], *, with_deltas: bool = False) -> Iterator[None]:
    """Let modules compute something else until the block ends, however it ends; then all is as it was.

    The forward is an instance attribute: class, names and hooks of the module stay.

    Args:
        places: modules with what stands in for their forward.
        with_deltas: the new forwards add the modules' adapters themselves, so that their own hooks need not.
    """
    undo: list[Callable[[], Any]] = []
    try:
        for module, forward in places:
            undo.append(_undoing(module))
            module.__dict__["forward"] = forward
            deltas = deltas_of(module)
            if deltas is not None and (with_deltas or getattr(forward, "adds_deltas", False)):
                deltas.inside = True
        yield
    finally:
        for step in reversed(undo):
            step()


def _undoing(module: nn.Module) -> Callable[[], None]:
    """Return what puts a module's present forward back, and lets its hook do what it does now."""
    before, adding = module.__dict__.get("forward"), deltas_of(module)
    inside = adding is not None and adding.inside

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before
        # another adapter may have come meanwhile, with a child of its own
        if (deltas := deltas_of(module)) is not None:
            deltas.inside = inside

    return undo
