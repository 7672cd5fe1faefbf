"""The DoRA delta: a pair that turns each row of the weight, and a magnitude that says how long the row is."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from sideroad.lowrank import LowRank
from sideroad.methods.lora import LoraDelta, PairOptions, add_bias_change
from sideroad.weights import require_kind

_BLOCK = 1 << 22
"""Elements of a weight that are looked at together: what a wider copy of a 16-bit weight may take."""


class DoraDelta(LoraDelta):
    """Low-rank update with a learned magnitude for each output (DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5).

        W' = m · (W + s B A) / n        n = ‖W + s B A‖ of each row, without a gradient (sec. 4.3)
        y' = y + (m/n - 1) (W x) + (m/n) s B A x

    The paper writes the norm over columns of a weight [in, out]; ours are rows of [out, in], one magnitude for each
    output, as in the authors' code. n comes from W Aᵀ, [out, rank], and never from B A, [out, in]:

        n² = ‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩     of each row

    m starts from the same function with B = 0, so m/n is exactly 1 then and y' is y bit for bit. The product W x is the
    layer's own output without its bias; with dropout both terms see the dropped x, as in the authors' code, which
    takes a second product with W. It must be the first delta that acts on its layer, for it reads the layer's output;
    several of them cannot act together.

    Args:
        magnitude: m, [out], float32 or wider whatever the pair is stored in.
        layer: the adapted layer; its rows' norms are taken now, and again where the weight was written or moved.
    """

    def __init__(
        self, A: Tensor, B: Tensor, *, magnitude: Tensor, layer: nn.Module, **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(A, B, **options)
        self.magnitude = nn.Parameter(magnitude)
        # no buffer: model.to(bfloat16) would round it
        self._squares = _key(self._weight(layer)), row_squares(self._weight(layer))

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y plus `weight` times what the change of the weight adds.

        Args:
            y: the layer's own output, with nothing added yet.
        """
        A, B = self.factors()
        # in 16 bits a gain near 1 would be rounded to 1, its distance from 1 is not
        excess = self.kind.spread_bias(layer, self.gain(layer) - 1).to(y.dtype)
        bias = layer._parameters.get("bias")
        if self.training and self.dropout > 0:
            dropped, kept = self.kind.dropped(x, self.dropout)
            plain = self.kind.product(layer, dropped)
            whole = self.kind.add(layer, dropped, plain, A, B, self.scale * kept)
            changed = torch.addcmul(y + (whole - plain), excess, whole)
        else:
            whole = self.kind.add(layer, x, y, A, B, self.scale)
            bare = whole if bias is None else whole - self.kind.spread_bias(layer, bias.detach()).to(y.dtype)
            changed = torch.addcmul(whole, excess, bare)
        if weight != 1.0:
            changed = y + weight * (changed - y)
        if self.beside is not None:
            changed = self.beside(x, changed, layer, weight)
        return changed if self.bias is None else add_bias_change(changed, self.bias, layer, weight)

    def gain(self, layer: nn.Module) -> Tensor:
        """Return m/n, [out], with a gradient for m alone; 1 where W + s B A has a row of zeros."""
        norms = self._norms(self._weight(layer))
        empty = norms == 0
        return torch.where(empty, torch.ones_like(norms), self.magnitude.to(norms) / norms.masked_fill(empty, 1.0))

    def lower(self, layer: nn.Module) -> LowRank:
        """Return the change of the layer's weight with its gain, s folded into B, in fp32 (fp64 where factors are).

        Raises:
            MergeError: as `LoraDelta.lower`.
        """
        low = super().lower(layer)
        return LowRank(low.A, low.B, self.gain(layer).detach())

    def _weight(self, layer: nn.Module) -> Tensor:
        kind = require_kind(layer)
        return kind.oriented(layer.get_parameter(kind.weight).detach())

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """Return ‖W + s B A‖ of each row, [out]; of no use where W + s B A nearly vanishes, as terms cancel."""
        # autocast would take the products in 16 bits
        with torch.autocast(weight.device.type, enabled=False):
            if not torch.compiler.is_compiling() and self._squares[0] != _key(weight):
                self._squares = _key(weight), row_squares(weight)
            squares = self._squares[1]
            A, B = self.matrix_pair(squares.dtype)
            crossed = torch.cat([block.to(A.dtype) @ A.t() for block in _blocks(weight)])
            own = (B @ (A @ A.t())).mul_(B).sum(1)
            return (squares + 2 * (crossed * B).sum(1) + own).clamp_min_(0).sqrt()

    def bound(self, layer: nn.Module) -> float:
        """Return infinity: what a magnitude makes of the weight has no bound that is cheap to tell."""
        return math.inf


def start_magnitude(layer: nn.Module) -> Tensor:
    """Return the magnitude that a new delta starts from: ‖W‖ of each row, [out]."""
    kind = require_kind(layer)
    return row_squares(kind.oriented(layer.get_parameter(kind.weight).detach())).sqrt()


def row_squares(weight: Tensor) -> Tensor:
    """Return the sum of squares of each row of [out, in], in fp32 (fp64 for an fp64 weight)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat([block.to(wide).square().sum(1) for block in _blocks(weight)])


def _key(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight is written, replaced or moved; tensors made in inference mode count no writes."""
    version = None if weight.is_inference() else weight._version
    return weight.device, None if weight.is_meta else weight.data_ptr(), version


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, _BLOCK // max(weight.shape[1], 1)))
