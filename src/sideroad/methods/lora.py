"""The LoRA delta, and the bias delta that may stand beside it or alone."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from sideroad.errors import MergeError
from sideroad.kinds import Kind, kind_of
from sideroad.kinds.changed_weight import Pair
from sideroad.kinds.convolution import CLASSES, sees_all_inputs
from sideroad.kinds.experts import Experts, per_expert
from sideroad.kinds.linear import Linear
from sideroad.lowrank import LowRank
from sideroad.methods.rows import TiedRows
from sideroad.pairs import Blocks, matrices, spread
from sideroad.weights import CHANNEL_NORMS


class PairOptions(TypedDict, total=False):
    """What every delta with a pair takes besides its tensors; see `LoraDelta`."""

    scale: float
    dropout: float
    bias: Tensor | None
    kind: Kind | None
    where: Blocks | None
    out_features: int
    start: tuple[Tensor, Tensor] | None


class LoraDelta(nn.Module):
    """Low-rank update of one layer (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

        y' = y + s · B A dropout(x)        and with a trained bias b':   + (b' - b)

    The products run in the input's dtype: the factors are cast, the input never is, so layers that read one input
    share one saved activation. While B is zero, y' equals y in every element (a -0.0 may become 0.0). Dropout acts on
    the branch's input alone, while this module is in training mode.

    Args:
        A: [rank, in], or the shape that the layer's kind gives it; taken as it is, its dtype is the storage dtype.
        B: [out, rank], or likewise; compact where `where` is given: [rows of all blocks, rank].
        scale: s.
        dropout: probability of zeroing an input element.
        bias: [out], or None where the bias is not trained.
        kind: of the layer; how the branch runs and what its weight looks like.
        where: blocks of the output that have a pair of their own (fused layers); None for one plain pair.
        out_features: of the layer; needed with `where`.
        start: A0 and B0 whose product is subtracted, where the pair does not start at zero; never trained.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        kind: Kind | None = None,
        where: Blocks | None = None,
        out_features: int = 0,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale
        self.dropout = dropout
        self.kind: Kind = kind or Linear()
        self.where = where
        self.out_features = out_features
        self.register_buffer("A0", None if start is None else start[0])
        self.register_buffer("B0", None if start is None else start[1])
        self.shared = False
        """Whether layers tied to this one follow it; a merge then writes the weight once and keeps the tie."""
        self.beside: TiedRows | None = None
        """Rows of the tied embedding, which act on this head too."""

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times this delta.

        Args:
            x: the layer's input, [..., in].
            y: the layer's own output, [..., out], perhaps with other deltas added.
            layer: the adapted layer; its bias is read, it is not called.
        """
        if self.beside is not None:
            y = self.beside(x, y, layer, weight)
        if self.bias is not None:
            y = add_bias_change(y, self.bias, layer, weight)
        factor: Tensor | float = weight * self.scale
        if self.training and self.dropout > 0:
            x, kept = self.kind.dropped(x, self.dropout)
            factor = factor * kept
        return self.kind.add(layer, x, y, *self.factors(), factor)

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return A and B as they act, with gradients, before anything is subtracted: the place where methods differ."""
        return self.A, self.B

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the pair whose product the branch adds, with gradients, in the shapes of its kind.

        With a start it is the pair of twice the rank, [A; A0] and [B, -B0], whose product is B A - B0 A0.
        """
        A, B = self.trained()
        if self.where is not None:
            B = spread(B, self.where, self.out_features)
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1)
        return A, B

    def matrix_pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factors as matrices, [rank, in] and [out, rank], s folded into B.

        Args:
            dtype: of the result, unless the factors are wider.
        """
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, dtype)
        A, B = matrices(A.to(wide), B.to(wide))
        return A, B * self.scale

    def changed_weight(self, weight: Tensor, factor: float) -> Tensor:
        """Return weight + factor · s · B A, in fp32 or wider and with gradients; for weights that others read.

        Args:
            weight: as `kind` stores it: [out, in], or one such matrix for each expert.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(self.kind, Experts):
            A, B = self.factors()
            return self.kind.changed(weight.to(wide), A.to(wide), B.to(wide), factor * self.scale)
        A, B = self.matrix_pair(wide)
        return torch.addmm(weight.to(A.dtype), B, A, alpha=factor)

    def expert_pair(self, weight: Tensor, factor: float) -> Pair:
        """Return factor · s · B A of each expert as the experts' own products take it, in the weight's dtype.

        Args:
            weight: stacked, as `kind` stores it.
        """
        assert isinstance(self.kind, Experts), "only experts have such pairs"
        A, B = self.factors()
        return self.kind.pair(A.to(weight.dtype), B.to(weight.dtype), weight.shape[0], factor * self.scale)

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the layer's tensors that a merge writes."""
        return (self.kind.weight, "bias") if self.bias is not None else (self.kind.weight,)

    def lower(self, layer: nn.Module) -> LowRank:
        """Return the change of the layer's weight, s folded into B, in fp32 (fp64 where the factors are).

        Raises:
            MergeError: PEFT's pair on a grouped convolution, whose change no grouped weight can hold.
        """
        if isinstance(layer, CLASSES) and sees_all_inputs(layer, self.A):
            raise MergeError(
                f"this adapter's pair on a {type(layer).__name__} with groups={layer.groups} is of PEFT's form, which "
                "reaches across the groups: no weight of that layer can hold its change. Use it unmerged; pairs "
                "trained here (one for each group) can be merged."
            )
        A, B = self.matrix_pair(torch.float32)
        return LowRank(A.detach(), B.detach())

    def bound(self, layer: nn.Module) -> float:
        """Return a number that no entry of the weight's change exceeds in size; NaN where one is."""
        if not isinstance(self.kind, Experts):
            return self.lower(layer).bound()
        A, B = (one.detach().double() for one in self.factors())
        A, B = per_expert(A, B, A.shape[0] // B.shape[1])
        return abs(self.scale) * float((B.norm(dim=2).amax(1) * A.norm(dim=1).amax(1)).amax())

    def extra_repr(self) -> str:
        """Show rank, scale and dropout in the model's printout."""
        return f"rank={self.B.shape[1]}, scale={self.scale:g}, dropout={self.dropout:g}"


class BiasDelta(nn.Module):
    """A trained bias on a layer that has no pair: `y' = y + (b' - b)`.

    Args:
        bias: b', [out].
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.beside: TiedRows | None = None
        """Rows of the tied embedding, which act on this head too."""

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times the bias change; x is not used for that."""
        if self.beside is not None:
            y = self.beside(x, y, layer, weight)
        return add_bias_change(y, self.bias, layer, weight)

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the name of the one tensor that a merge writes."""
        return ("bias",)

    def lower(self, layer: nn.Module) -> None:
        """There is no low-rank change; `bias` is all."""


def add_bias_change(y: Tensor, bias: Tensor, layer: nn.Module, weight: float) -> Tensor:
    """Return y + weight · (bias - layer.bias): exactly y where they agree."""
    change, kind = bias_change(bias, layer, weight), kind_of(layer)
    if isinstance(layer, CHANNEL_NORMS):
        change = change.reshape(-1, *[1] * (y.ndim - 2))
    return y + (change if kind is None else kind.spread_bias(layer, change)).to(y.dtype)


def bias_change(bias: Tensor, layer: nn.Module, weight: float) -> Tensor:
    """Return weight · (bias - layer.bias), [out], in the wider dtype of both."""
    base = layer.get_parameter("bias").detach()
    wide = torch.promote_types(bias.dtype, base.dtype)
    return weight * (bias.to(wide) - base.to(wide))
