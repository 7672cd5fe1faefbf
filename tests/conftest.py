"""Fixtures that many tests share; the makers behind them are in tiny.py (`from tiny import tiny_llama`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model_dir


@pytest.fixture(scope="session")
def shared_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; read only."""
    return tiny_model_dir(tmp_path_factory.mktemp("base"))
