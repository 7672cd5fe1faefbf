"""Train and eval mode of a model's modules, set for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into eval mode, and each back into its own mode afterwards, also on an error."""
    with _in_mode(model, training=False):
        yield


@contextmanager
def in_train_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into training mode; otherwise as `in_eval_mode`."""
    with _in_mode(model, training=True):
        yield


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the CUDA devices that hold parameters of the model, for `torch.random.fork_rng`."""
    found = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    return sorted(index for index in found if index is not None)


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    others = [module for module in model.modules() if module.training != training]
    try:
        for module in others:
            module.training = training
        yield
    finally:
        for module in others:
            module.training = not training
