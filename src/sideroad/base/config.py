"""The `base` section of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from sideroad.config import Settings

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class BaseConfig(Settings):
    """Which model is adapted, and how it is held in memory."""

    model: str
    """A named model (`smollm2-135m-instruct`), a directory, a `.gguf` file, or a hub id (`owner/name`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes the default branch."""
    quantize: None = None
    """Quantised storage of the base; only null for now."""
    dtype: DtypeName = "auto"
    """Storage and compute type. `auto`: what is fast and safe on the device; on a CPU a short probe decides."""
    device: str = "auto"
    """`auto` (cuda, else mps, else cpu), `cpu`, `mps`, `cuda` or `cuda:N`."""

    @field_validator("model")
    @classmethod
    def _reject_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the model is empty; give a named model, a directory, a .gguf file or a hub id")
        return value

    @field_validator("quantize", mode="before")
    @classmethod
    def _refuse_quantize(cls, value: object) -> object:
        if value is not None:
            raise ValueError("quantised bases are not supported; use null")
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("a device is auto, cpu, mps, cuda or cuda:N")
        return value
