"""LowRank: what every adapted weight lowers to, `W' = gain · (W + B·A)`, and its exact algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sideroad.errors import AdapterError


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of one weight, `W' = gain[:, None] * (W + B @ A)`; the scale s is folded into B.

    Args:
        A: [rank, in].
        B: [out, rank].
        gain: [out], or nothing, which means 1 (only DoRA has one).
    Raises:
        AdapterError: shapes that do not go together.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        fits = self.A.ndim == 2 and self.B.ndim == 2 and self.A.shape[0] == self.B.shape[1] and self.A.shape[0] > 0
        if not fits or (self.gain is not None and self.gain.shape != self.B.shape[:1]):
            gain = "" if self.gain is None else f", gain {list(self.gain.shape)}"
            raise AdapterError(
                f"factors do not fit: found A {list(self.A.shape)}, B {list(self.B.shape)}{gain}; "
                "needed A [rank, in], B [out, rank], gain [out], with a rank of at least 1."
            )

    @property
    def rank(self) -> int:
        """Rows of A; the product's rank may be smaller."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it changes."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """Return the change `B @ A` as [out, in], in fp32.

        Raises:
            AdapterError: there is a gain, so the change depends on the weight.
        """
        self._refuse_gain("the dense change")
        A, B = self._precise()
        return (B @ A).float()

    def norm(self) -> float:
        """Return the Frobenius norm of `B @ A` without forming it: QR of both factors in fp64.

        Raises:
            AdapterError: there is a gain, so the change depends on the weight.
        """
        self._refuse_gain("the norm")
        _, core, _ = self._core()
        return float(torch.linalg.matrix_norm(core))

    def bound(self) -> float:
        """Return a number that no entry of `B @ A` exceeds in size, by the Cauchy-Schwarz inequality; NaN where one is.

        Costs as much as reading the factors; gain is left out.
        """
        A, B = self._precise()
        return float(B.norm(dim=1).amax() * A.norm(dim=0).amax())

    def singular_values(self) -> Tensor:
        """Return the min(rank, out, in) possibly non-zero singular values of `B @ A`, largest first, in fp64.

        Raises:
            AdapterError: there is a gain, so the change depends on the weight.
        """
        self._refuse_gain("the spectrum")
        _, core, _ = self._core()
        values: Tensor = torch.linalg.svdvals(core)
        return values

    def add(self, other: LowRank) -> LowRank:
        """Return the sum of two changes of one weight, exactly, by concatenating factors; ranks add up.

        Raises:
            AdapterError: shapes differ, or one has a gain (a sum of changed weights is not of this form).
        """
        self._refuse_gain("the sum")
        other._refuse_gain("the sum")
        if self.shape != other.shape:
            raise AdapterError(
                f"cannot add changes of different layers: found [out, in] = {list(self.shape)} and {list(other.shape)}."
            )
        dtype = torch.promote_types(self.A.dtype, other.A.dtype)
        device = self.A.device
        A = torch.cat([self.A.to(dtype), other.A.to(device, dtype)])
        B = torch.cat([self.B.to(dtype), other.B.to(device, dtype)], dim=1)
        return LowRank(A, B)

    def scaled(self, factor: float) -> LowRank:
        """Return the change times a number, which goes into B.

        Raises:
            AdapterError: there is a gain and the factor is not 1.
        """
        if factor == 1.0:
            return self
        self._refuse_gain("a multiple")
        return LowRank(self.A, self.B * factor)

    def truncate(self, rank: int) -> LowRank:
        """Return the closest change of at most `rank` (Eckart-Young), its singular values shared evenly by A and B.

        Works on QR factors and a rank-sized SVD in fp64. A rank not below the present one changes nothing; a gain is
        kept, and what is approximated is then `B @ A` alone.

        Raises:
            AdapterError: rank below 1.
        """
        if rank < 1:
            raise AdapterError(f"cannot truncate to rank {rank}; the least is 1.")
        if rank >= self.rank:
            return self
        left, core, right = self._core()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        root = S[:rank].sqrt()
        B = left @ U[:, :rank] * root
        A = root[:, None] * Vh[:rank] @ right.t()
        return LowRank(A.to(self.A), B.to(self.B), self.gain)

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return `gain · (weight + B @ A)` in fp32, or in fp64 where a factor or the weight is.

        Args:
            weight: [out, in]; left as it is.
        Raises:
            AdapterError: the weight has another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise AdapterError(
                f"a change of [out, in] = {list(self.shape)} does not fit a weight of {list(weight.shape)}."
            )
        A, B = self._precise(weight)
        changed = torch.addmm(weight.to(A.dtype), B, A)
        return changed if self.gain is None else changed * self.gain.to(changed)[:, None]

    def _precise(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tensors = [self.A, self.B] if weight is None else [self.A, self.B, weight]
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if double else torch.float32
        device = tensors[-1].device
        return self.A.to(device, dtype), self.B.to(device, dtype)

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q_B, R_B·R_Aᵀ and Q_A, so that B·A = Q_B · core · Q_Aᵀ."""
        # MPS has no fp64
        device = "cpu" if self.A.device.type == "mps" else self.A.device
        left, upper_b = torch.linalg.qr(self.B.detach().to(device, torch.float64))
        right, upper_a = torch.linalg.qr(self.A.detach().t().to(device, torch.float64))
        return left, upper_b @ upper_a.t(), right

    def _refuse_gain(self, what: str) -> None:
        if self.gain is not None:
            raise AdapterError(
                f"{what} is not defined for a change with a gain: it multiplies the weight itself; "
                "apply it to the weight first (apply_to)."
            )


def changed(weight: Tensor, changes: Sequence[tuple[LowRank, float]]) -> Tensor:
    """Return a weight with several changes of it, each taken so many times, in fp32 or wider.

    Every change is of the weight as it is given: one with a gain, `W' - W`, looks at nothing that others add.

    Args:
        weight: [out, in]; left as it is.
        changes: with the factor of each.
    """
    total = weight
    for low, factor in changes:
        if low.gain is not None:
            whole = low.apply_to(weight)
            total = whole if factor == 1.0 and total is weight else total + factor * (whole - weight)
    plain = [low.scaled(factor) for low, factor in changes if low.gain is None]
    return reduce(LowRank.add, plain).apply_to(total) if plain else total
