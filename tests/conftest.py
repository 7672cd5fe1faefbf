"""Fixtures that many tests share; the makers behind them are in tiny.py (`from tiny import tiny_llama`)."""

from __future__ import annotations

import os
from pathlib import Path

# Sums then come out the same on a busy machine, and two workers do not fight over the cores. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tiny import tiny_model_dir

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; read only."""
    return tiny_model_dir(tmp_path_factory.mktemp("base"))
