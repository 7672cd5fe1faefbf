"""Tensors that a backward pass need not keep, because they are quickly made again from ones that are kept anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_sideroad_source"


@dataclass(frozen=True)
class Source:
    """What a tensor was made from: the function, its tensors, and whatever of its arguments is no tensor."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    arguments: tuple[Any, ...] = ()


def mark(made: Tensor, source: Source) -> Tensor:
    """Note on a tensor what it was made from; the note holds for this Python object as long as nobody writes to it."""
    made.__dict__[_ATTRIBUTE] = (source, made._version)
    return made


def source_of(tensor: Tensor) -> Source | None:
    """Return the note on a tensor; None where there is none, or the tensor has been written to since."""
    source, version = tensor.__dict__.get(_ATTRIBUTE, (None, 0))
    return source if version == tensor._version else None


def remake(source: Source) -> Tensor:
    """Make the tensor again, as [tokens, width]."""
    made = source.function(*source.tensors, *source.arguments)
    return made.reshape(-1, made.shape[-1])
