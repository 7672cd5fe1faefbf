"""Peak memory of one method on one task of `bench/methods.py`; runs in a fresh process, above the loaded model."""

from __future__ import annotations

import gc
from typing import Protocol

import torch
from method_table import Method
from resident import peak_bytes, restart_peak

from sideroad.base.config import BaseConfig
from sideroad.base.loading import Base, load_base


class Runs(Protocol):
    """A task's runs, as far as memory is concerned."""

    def heaviest(self, method: Method, base: Base) -> None:
        """Train a loaded base for a few steps on the largest batches."""


def measure_memory(runs: Runs, method: Method, base: str) -> int:
    """Return the bytes that a run needs at its peak above model and rows, from attaching to its third step."""
    loaded = load_base(BaseConfig(model=base, device="cpu"), dtype=torch.float32)
    # weights are mapped from their file and come into memory when first read: until then they would count as the run's
    for parameter in loaded.model.parameters():
        parameter.sum()
    gc.collect()
    before = restart_peak()
    runs.heaviest(method, loaded)
    return max(0, peak_bytes() - before)
