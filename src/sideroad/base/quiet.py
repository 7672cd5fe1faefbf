"""Keeping transformers' progress bars and load reports off the terminal while sideroad loads and checks by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, transformers shows no progress bar and logs errors only; afterwards all is as before.

    What its warnings would say about a checkpoint (missing, unexpected or misshapen tensors) is checked by the loader.
    """
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(max(level, transformers_logging.ERROR))
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
