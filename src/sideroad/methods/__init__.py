"""Methods: what changes parameters or the forward of a layer. One file each, one line each in the table below.

| paper                                   | axis            | where                       |
|-----------------------------------------|-----------------|-----------------------------|
| LoRA, arXiv:2106.09685                  | delta           | methods/lora.py             |
| rsLoRA, arXiv:2312.03732                | scaling         | scaling.py, `alpha/sqrt(r)` |
| LoRA+, arXiv:2402.12354                 | optimizer ratio | train, `optim.lr_ratio_b`   |

Beside a method's pairs an adapter may hold trained biases (methods/lora.py), token rows (methods/rows.py) and modules
trained whole (methods/replaced.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.kinds import Kind, kind_of
from sideroad.kinds.convolution import CLASSES, sees_all_inputs
from sideroad.kinds.experts import Experts
from sideroad.lowrank import LowRank
from sideroad.methods.lora import BiasDelta, LoraDelta
from sideroad.methods.replaced import Replaced
from sideroad.methods.rows import RowsDelta
from sideroad.pairs import blocks, slices_of
from sideroad.patterns import first_match
from sideroad.scaling import scale

PARTS: Mapping[str, tuple[str, ...]] = {"lora": ("A", "B")}
"""Method kind → names of the tensors that a target needs; `bias` may stand beside them or alone."""

_NO_BRANCH = (
    "is a projection of nn.MultiheadAttention, which reads its weight and has no branch to drop from. Set dropout to "
    "0, or leave the attention out with exclude"
)
_NO_BRANCH_EXPERTS = (
    "is a stacked weight of fused experts, whose forward reads it, so there is no branch to drop from. Set dropout to "
    "0, or leave the experts out with exclude"
)

ROWS = "rows"
"""Name of the tensor that holds trained token rows, [ids, dim]."""


class Delta(Protocol):
    """One method on one layer: an nn.Module whose parameters are the adapter's tensors, by name."""

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the delta, without calling the layer."""

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the layer's tensors that a merge writes."""

    def lower(self, layer: nn.Module) -> LowRank | None:
        """Return the change of the layer's weight; None where it is not of low rank (bias, rows, whole modules)."""


def make_delta(config: AdapterConfig, path: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the delta of one layer from its tensors, copied to the layer's device and the configured dtype.

    Args:
        path: of the layer; patterns of the configuration may look at it.
        tensors: the method's parts, or `bias`, or both; or `rows`.
    Raises:
        AdapterError: dropout on a layer that has no branch of its own, or slices that do not fit the layer.
    """
    parameter = next(layer.parameters(recurse=False))
    dtype = parameter.dtype if config.dtype == "base" else torch.float32
    placed = {
        part: tensor.detach().to(parameter.device, dtype, copy=True, memory_format=torch.contiguous_format)
        for part, tensor in tensors.items()
    }
    if ROWS in placed:
        return RowsDelta(placed[ROWS], tokens_of(config, path))
    if "A" not in placed:
        return BiasDelta(placed["bias"])
    kind = kind_of(layer)
    assert kind is not None, "fitting and targets let only known kinds through"
    if kind.seam == "owner" and config.method.dropout:
        raise AdapterError(f"dropout is {config.method.dropout}, but {path} {branchless(kind)}.")
    parts, out_features = slices_of(config, path), kind.shape(layer)[0]
    return LoraDelta(
        placed["A"],
        placed["B"],
        scale=scale(config, path, layer_rank(layer, placed["A"], placed["B"])),
        dropout=config.method.dropout,
        bias=placed.get("bias"),
        kind=kind,
        where=None if parts is None else blocks(parts, out_features),
        out_features=out_features,
    )


def branchless(kind: Kind) -> str:
    """Say why there can be no dropout on a kind whose seam is its owner."""
    return _NO_BRANCH_EXPERTS if isinstance(kind, Experts) else _NO_BRANCH


def tune_delta(delta: nn.Module, config: AdapterConfig, path: str, layer: nn.Module) -> None:
    """Give a delta the scale, dropout, slices and token ids of another configuration of the same shapes."""
    if isinstance(delta, LoraDelta):
        delta.scale = scale(config, path, layer_rank(layer, delta.A, delta.B))
        delta.dropout = config.method.dropout
        parts = slices_of(config, path)
        delta.where = None if parts is None else blocks(parts, delta.out_features)
    elif isinstance(delta, RowsDelta):
        delta.name(tokens_of(config, path))


def layer_rank(layer: nn.Module, A: Tensor, B: Tensor) -> int:
    """Return the rank that the scale is taken from: of one pair, where a layer has several (slices, groups)."""
    if isinstance(layer, CLASSES) and sees_all_inputs(layer, A):
        return A.shape[0]
    return B.shape[1]


def tokens_of(config: AdapterConfig, path: str) -> tuple[int, ...]:
    """Return the ids of the token rows that are trained in the layer at a path; the first matching pattern counts."""
    return first_match(config.trainable_tokens, path, ())


def acting(delta: nn.Module) -> tuple[nn.Module, ...]:
    """Return a delta and what acts on its layer beside it under the same name: the rows of a tied embedding."""
    beside = delta.beside if isinstance(delta, LoraDelta | BiasDelta) else None
    return (delta,) if beside is None else (delta, beside)


def parts_of(delta: nn.Module) -> dict[str, Tensor]:
    """Return a delta's live tensors by name, detached; of a module trained whole its buffers too."""
    if isinstance(delta, Replaced):
        return {name: tensor.detach() for name, tensor in delta.tensors().items()}
    return {part: parameter.detach() for part, parameter in delta.named_parameters()}


def parameters_of(delta: nn.Module) -> dict[str, nn.Parameter]:
    """Return a delta's live parameters by name."""
    return dict((delta.copy if isinstance(delta, Replaced) else delta).named_parameters())
