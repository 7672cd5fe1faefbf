"""Methods: what changes parameters or the forward of a layer. One file each, one line each in the table below.

| paper                                   | axis            | where                       |
|-----------------------------------------|-----------------|-----------------------------|
| LoRA, arXiv:2106.09685                  | delta           | methods/lora.py             |
| rsLoRA, arXiv:2312.03732                | scaling         | scaling.py, `alpha/sqrt(r)` |
| LoRA+, arXiv:2402.12354                 | optimizer ratio | train, `optim.lr_ratio_b`   |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sideroad.config import AdapterConfig
from sideroad.lowrank import LowRank
from sideroad.methods.lora import BiasDelta, LoraDelta
from sideroad.scaling import scale

PARTS: Mapping[str, tuple[str, ...]] = {"lora": ("A", "B")}
"""Method kind → names of the tensors that a target needs; `bias` may stand beside them or alone."""


class Delta(Protocol):
    """One method on one layer: an nn.Module whose parameters are the adapter's tensors, by name."""

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the delta, without calling the layer."""

    def lower(self, layer: nn.Module) -> LowRank | None:
        """Return the change of the layer's weight; None where only the bias changes."""


def make_delta(config: AdapterConfig, path: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the delta of one layer from its tensors, copied to the layer's device and the configured dtype.

    Args:
        path: of the layer; patterns of the configuration may look at it.
        tensors: the method's parts, or `bias`, or both.
    """
    parameter = next(layer.parameters(recurse=False))
    dtype = parameter.dtype if config.dtype == "base" else torch.float32
    placed = {
        part: tensor.detach().to(parameter.device, dtype, copy=True, memory_format=torch.contiguous_format)
        for part, tensor in tensors.items()
    }
    if "A" not in placed:
        return BiasDelta(placed["bias"])
    s = scale(config, path, placed["A"].shape[0])
    return LoraDelta(placed["A"], placed["B"], scale=s, dropout=config.method.dropout, bias=placed.get("bias"))


def tune_delta(delta: nn.Module, config: AdapterConfig, path: str) -> None:
    """Give a delta the scale and dropout of another configuration of the same shapes."""
    if isinstance(delta, LoraDelta):
        delta.scale = scale(config, path, delta.A.shape[0])
        delta.dropout = config.method.dropout


def parts_of(delta: nn.Module) -> dict[str, Tensor]:
    """Return a delta's live tensors by name, detached."""
    return {part: parameter.detach() for part, parameter in delta.named_parameters()}
