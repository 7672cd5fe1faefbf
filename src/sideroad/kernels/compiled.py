"""The elementwise pieces through torch.compile: whether that is possible here, and what it costs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch

from sideroad.kernels.pieces import FUNCTIONS, Pieces

COLD_SECONDS, WARM_SECONDS = 27.0, 5.0
"""What compiling took on 2 server cores, the first time and from the cache; machines differ."""

GAIN = 0.02
"""Share of a step that compiled pieces save (measured on 2 cores: 1 to 2 %; docs/log.md)."""


def refusal(device: torch.device) -> str | None:
    """Say why pieces cannot be compiled for a device; None if they can."""
    if device.type == "cpu":
        named = os.environ.get("CXX", "g++")
        if shutil.which(named) is None and shutil.which("clang++") is None:
            return f"there is no C++ compiler ({named})"
        return None
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    return f"torch compiles nothing for {device.type}"


def compiled(cache: Path | None = None) -> Pieces:
    """Return the pieces compiled for any number of tokens; each is compiled when it is first called.

    Args:
        cache: directory for compiled code, so that the next process starts fast; torch's own by default. A directory
            that the environment names (TORCHINDUCTOR_CACHE_DIR) wins.
    """
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    made = [torch.compile(function, dynamic=True, fullgraph=True) for function in FUNCTIONS]
    return Pieces("compiled", *made)  # type: ignore[arg-type]


def earns(run_seconds: float, *, warm: bool) -> bool:
    """Tell whether a run is long enough that compiling pays: it must save twice what it costs."""
    return run_seconds * GAIN > 2 * (WARM_SECONDS if warm else COLD_SECONDS)
