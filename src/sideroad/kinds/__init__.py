"""Kinds of layers that a low-rank pair can act on. One file each, one line each in the table below.

| layers                                | weight as [out, in]                    | where                |
|---------------------------------------|----------------------------------------|----------------------|
| `nn.Linear`, GPT-2's `Conv1D`         | itself, or its transpose               | kinds/linear.py      |
| `nn.Embedding`                        | its transpose: [dim, tokens]           | kinds/embedding.py   |
| `nn.Conv1d`, `Conv2d`, `Conv3d`       | flattened: [out, in / groups * kernel] | kinds/convolution.py |
| subclasses that prepare their input   | likewise                               | kinds/prepared.py    |
| projections of `nn.MultiheadAttention` | itself; substituted for the call      | kinds/attention.py   |
| fused experts, 3-D parameters         | [experts * out, in]; substituted       | kinds/experts.py     |
"""

from __future__ import annotations

from torch import nn

from sideroad.kinds.attention import InProjection, OutProjection
from sideroad.kinds.convolution import Convolution
from sideroad.kinds.embedding import Embedding
from sideroad.kinds.experts import Experts, TransposedExperts
from sideroad.kinds.kind import Kind
from sideroad.kinds.linear import Linear, Transposed
from sideroad.kinds.prepared import PreparedConvolution
from sideroad.kinds.probe import keeps_its_promise

__all__ = ["ALLOWED", "KINDS", "Kind", "keeps_its_promise", "kind_of"]

KINDS: tuple[Kind, ...] = (
    Linear(), Transposed(), Embedding(), Convolution(), PreparedConvolution(), InProjection(), OutProjection(),
    Experts(), TransposedExperts(),
)  # fmt: skip
"""Every kind; no layer is claimed by two."""

ALLOWED = (
    "nn.Linear, Conv1D, nn.Embedding, nn.Conv1d/2d/3d and the projections of nn.MultiheadAttention, and the weights of "
    "fused experts"
)
"""The kinds in words, for messages."""


def kind_of(layer: nn.Module) -> Kind | None:
    """Return the kind that claims a layer, or None where no pair can act on it."""
    return next((kind for kind in KINDS if kind.claims(layer)), None)
