"""Fixtures that many tests share; the makers behind them are in tiny.py (`from tiny import tiny_llama`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Sums then come out the same on a busy machine, and two workers do not fight over the cores. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from tiny import tiny_model_dir

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.load_profile("any machine")
# A shell that puts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def spare_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the cache of the person who runs the tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDEROAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; read only."""
    return tiny_model_dir(tmp_path_factory.mktemp("base"))
