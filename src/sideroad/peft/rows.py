"""A batch whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sideroad.errors import AdapterError, MergeError
from sideroad.peft.lora_model import LoraModel

BASE = "__base__"
"""The name that means the base alone."""


@contextmanager
def rows(tuner: LoraModel, names: Sequence[str] | None, beams: int = 1) -> Iterator[None]:
    """Let each row of a batch have its own adapter inside a `with` block.

    Args:
        names: one for each row; None leaves the chosen adapters as they are.
        beams: rows that beam search makes out of each.
    Raises:
        AdapterError: no list of names, unknown ones (all are listed), or adapters that are disabled.
        MergeError: adapters are merged.
    """
    if names is None:
        yield
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"adapter_names is {names!r}; expected a list of names, one for each row of the batch.")
    tuner.known([name for name in dict.fromkeys(names) if name != BASE])
    if tuner.merged_adapters:
        raise MergeError(
            f"adapter_names while {', '.join(tuner.merged_adapters)} is merged into the weights; call "
            "unmerge_adapter() first."
        )
    if not tuner.enabled:
        raise AdapterError("adapter_names while adapters are disabled; enable them, or leave adapter_names out.")
    repeated = [None if name == BASE else name for name in names for _ in range(beams)]
    handle: Any = tuner.handle
    with handle.rows(repeated):
        yield
