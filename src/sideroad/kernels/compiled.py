"""The elementwise pieces through torch.compile: whether that is possible here, and what it costs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import torch

from sideroad.kernels.pieces import FUNCTIONS, Pieces

COLD_SECONDS, WARM_SECONDS = 27.0, 5.0
"""What compiling took on 2 server cores, the first time and from the cache; machines differ."""

_FOLDER_KEY = "TORCHINDUCTOR_CACHE_DIR"

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


def folder_for(cache: Path) -> Path:
    """Return where compiled code lies inside sideroad's cache; other versions of torch have their own."""
    return cache / "compiled" / torch.__version__.replace("+", "-")


def is_warm(folder: Path) -> bool:
    """Whether something has been compiled into a folder before."""
    return folder.is_dir() and any(folder.iterdir())


def compiled(folder: Path | None = None) -> Pieces:
    """Return the pieces compiled for any number of tokens; each is compiled when it is first called.

    Args:
        folder: for compiled code, so that the next process starts fast; None leaves torch's choice. A directory that
            the user has named (TORCHINDUCTOR_CACHE_DIR) wins.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its default into the environment, so an unset variable does not tell what the user said
    if folder is not None and os.environ.get(_FOLDER_KEY, default_cache_dir()) == default_cache_dir():
        os.environ[_FOLDER_KEY] = str(folder)
    # not fullgraph: beyond torch's limit of recompilations a piece then computes itself instead of raising
    made = [torch.compile(_own(function), dynamic=True) for function in FUNCTIONS]
    return Pieces("compiled", *made)  # type: ignore[arg-type]


def _own(function: Callable[..., object]) -> Callable[..., object]:
    """Return the function with code of its own: torch counts recompilations by code, over all models of a process."""
    assert isinstance(function, FunctionType), "pieces are plain functions"
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


def failure(pieces: Pieces, device: torch.device) -> str | None:
    """Try one piece, and say in a line why it cannot be compiled; None if it can."""
    e = torch.ones(3, 8, device=device)
    try:
        with torch.no_grad():
            pieces.gate(e, e, "silu")
    except Exception as error:  # whatever a broken compiler or an unwritable folder raises
        first = str(error).strip().partition("\n")[0]
        return f"compiling fails here ({type(error).__name__}: {first}); its folder is {os.environ.get(_FOLDER_KEY)}"
    return None


def earns(run_seconds: float, *, warm: bool) -> bool:
    """Tell whether a run is long enough that compiling pays: it must save twice what it costs."""
    return run_seconds * GAIN > 2 * (WARM_SECONDS if warm else COLD_SECONDS)
