"""Methods: what changes parameters or the forward of a layer. One file each, one line each in the table below.

| paper                                   | axis            | where                       |
|-----------------------------------------|-----------------|-----------------------------|
| LoRA, arXiv:2106.09685                  | delta           | methods/lora.py             |
| DoRA, arXiv:2402.09353                  | delta           | methods/dora.py             |
| AdaLoRA, arXiv:2303.10512               | delta, budget   | methods/adalora.py, budget.py |
| LoRA-FA, arXiv:2308.03303               | delta           | methods/lora_fa.py, `trains: B` |
| rsLoRA, arXiv:2312.03732                | scaling         | scaling.py, `alpha/sqrt(r)` |
| PiSSA, arXiv:2404.02948                 | init            | init.py, `pissa`, `pissa-fast` |
| OLoRA, arXiv:2406.01775                 | init            | init.py, `olora`            |
| EVA, arXiv:2410.07170                   | init            | data_init.py, `eva`         |
| LoRA-GA, arXiv:2407.05000               | init            | data_init.py, `lora-ga`     |
| LoRA+, arXiv:2402.12354                 | optimizer ratio | train, `optim.lr_ratio_b`   |

Beside a method's pairs an adapter may hold trained biases (methods/lora.py), token rows (methods/rows.py) and modules
trained whole (methods/replaced.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.kinds import kind_of
from sideroad.kinds.convolution import CLASSES, sees_all_inputs
from sideroad.lowrank import LowRank
from sideroad.methods.adalora import AdaloraDelta
from sideroad.methods.dora import DoraDelta
from sideroad.methods.lora import BiasDelta, LoraDelta, PairOptions
from sideroad.methods.lora_fa import LoraFaDelta
from sideroad.methods.objections import objection
from sideroad.methods.replaced import Replaced
from sideroad.methods.rows import RowsDelta
from sideroad.pairs import blocks, slices_of
from sideroad.patterns import first_match
from sideroad.scaling import scale

PARTS: Mapping[str, tuple[str, ...]] = {
    "lora": ("A", "B"), "dora": ("A", "B", "magnitude"), "adalora": ("A", "B", "E")
}  # fmt: skip
"""Method kind → names of the tensors that a target needs; `bias` may stand beside them or alone."""

START = ("A0", "B0")
"""Names of the pair whose product is subtracted, where an initialisation has one."""

Maker = Callable[[Mapping[str, Tensor], nn.Module, PairOptions], LoraDelta]

MAKERS: Mapping[str, Maker] = {
    "lora": lambda parts, layer, options: LoraDelta(parts["A"], parts["B"], **options),
    "lora-fa": lambda parts, layer, options: LoraFaDelta(parts["A"], parts["B"], **options),
    "dora": lambda parts, layer, options: DoraDelta(
        parts["A"], parts["B"], magnitude=parts["magnitude"], layer=layer, **options
    ),
    "adalora": lambda parts, layer, options: AdaloraDelta(parts["A"], parts["B"], E=parts["E"], **options),
}
"""A method's variant → its delta on a layer, from tensors by name."""

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
        part: tensor.detach().to(
            parameter.device,
            torch.promote_types(parameter.dtype, torch.float32) if part == "magnitude" else dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for part, tensor in tensors.items()
    }
    if ROWS in placed:
        return RowsDelta(placed[ROWS], tokens_of(config, path))
    if "A" not in placed:
        return BiasDelta(placed["bias"])
    kind = kind_of(layer)
    assert kind is not None, "fitting and targets let only known kinds through"
    if why := objection(config, path, layer):
        raise AdapterError(f"{path} {why}.")
    parts, out_features = slices_of(config, path), kind.shape(layer)[0]
    options = PairOptions(
        scale=scale(config, path, layer_rank(layer, placed["A"], placed["B"])),
        dropout=config.method.dropout,
        bias=placed.get("bias"),
        kind=kind,
        where=None if parts is None else blocks(parts, out_features),
        out_features=out_features,
        start=(placed["A0"], placed["B0"]) if "A0" in placed else None,
    )
    return MAKERS[config.method.variant](placed, layer, options)


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
    # what a pair does not train (a start, A of LoRA-FA) is a buffer
    fixed = delta.named_buffers() if isinstance(delta, LoraDelta) else ()
    return {part: tensor.detach() for part, tensor in (*delta.named_parameters(), *fixed)}


def parameters_of(delta: nn.Module) -> dict[str, nn.Parameter]:
    """Return a delta's live parameters by name."""
    return dict((delta.copy if isinstance(delta, Replaced) else delta).named_parameters())
