"""The AdaLoRA delta: a pair with a singular value for each of its ranks."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from sideroad.methods.lora import LoraDelta, PairOptions


class AdaloraDelta(LoraDelta):
    """An update in triplets, `W' = W + s P Λ Q` (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512, eq. 3).

    Q is A and P is B, the names by which files know them; Λ is E, one value a rank, so that a rank can be switched off
    (E = 0) and on again without losing its vectors. s is alpha over the rank at the start, and stays so while ranks go.

    Args:
        E: [rank, 1].
    """

    def __init__(self, A: Tensor, B: Tensor, *, E: Tensor, **options: Unpack[PairOptions]) -> None:
        super().__init__(A, B, **options)
        self.E = nn.Parameter(E)

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return Λ Q and P."""
        return self.A * self.E.view(-1, *[1] * (self.A.ndim - 1)), self.B
