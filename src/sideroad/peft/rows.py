"""A batch whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sideroad.errors import AdapterError, MergeError
from sideroad.peft.lora_model import LoraModel

BASE = "__base__"
"""The name that means the base alone."""


@contextmanager
def rows(tuner: LoraModel, names: Sequence[str] | None, batch: int | None, copies: int = 1) -> Iterator[None]:
    """Let each row of a batch have its own adapter inside a `with` block; in training, too.

    Args:
        names: one for each row; None leaves the chosen adapters as they are.
        batch: rows that the model is given, if that is known.
        copies: rows that generation makes out of each.
    Raises:
        AdapterError: no list of names, unknown ones (all are listed), another number than rows, or adapters that are
            disabled.
        MergeError: adapters are merged.
    """
    if names is None:
        yield
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"adapter_names is {names!r}; expected a list of names, one for each row of the batch.")
    tuner.known([name for name in dict.fromkeys(names) if name != BASE])
    if batch is not None and batch != len(names):
        raise AdapterError(
            f"adapter_names has {len(names)} names, but the batch has {batch} rows; name one for each row "
            f'("{BASE}" for the base).'
        )
    if tuner.merged_adapters:
        raise MergeError(
            f"adapter_names while {', '.join(tuner.merged_adapters)} is merged into the weights; call "
            "unmerge_adapter() first."
        )
    if not tuner.enabled:
        raise AdapterError("adapter_names while adapters are disabled; enable them, or leave adapter_names out.")
    with tuner.handle.rows([None if name == BASE else tuner.weighed([name]) for name in names], copies):
        yield


def rows_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return the size of the batch that a model's arguments hold, or None where they do not show it."""
    given = [*args, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs", "pixel_values", "x"))]
    return next((one.shape[0] for one in given if isinstance(one, Tensor) and one.ndim), None)


def copies_in(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Return how many rows `generate` makes out of each prompt: by beam search, or by several answers."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    counts = [
        kwargs.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    ]
    return max(counts)
