"""What a packed or padded batch predicts, and where: each place once, with all tokens that follow it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sideroad.kernels.cross_entropy import IGNORED


@dataclass(frozen=True)
class Predictions:
    """Places of a batch that predict something. A place has several targets where sequences part behind it.

    Attributes:
        places: [n] ascending, in the batch flattened to one row.
        owners: [m] ascending, for each target the index of its place among the n.
        targets: [m] token to predict.
        counts: [n] targets of each place, as fp32.
        offsets: n + 1 numbers: the targets of place i are those from offsets[i] to offsets[i + 1].
    """

    places: Tensor
    owners: Tensor
    targets: Tensor
    counts: Tensor
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, targets: Tensor, extra: tuple[Tensor, Tensor] | None = None) -> Predictions:
        """Collect the targets of a batch.

        Args:
            targets: [rows, length], -100 for none.
            extra: further (places, targets) of a flattened batch, each [any].
        """
        flat = targets.flatten()
        where = (flat != IGNORED).nonzero()[:, 0]
        wanted = flat[where]
        if extra is not None:
            where, order = torch.cat((where, extra[0].to(where.device))).sort(stable=True)
            wanted = torch.cat((wanted, extra[1].to(wanted.device)))[order]
        places, owners, counts = torch.unique_consecutive(where, return_inverse=True, return_counts=True)
        offsets = (0, *counts.cumsum(0).tolist())
        return cls(places, owners, wanted, counts.float(), offsets)

    def to(self, device: torch.device) -> Predictions:
        """Move the tensors to a device."""
        places, owners, targets, counts = (
            one.to(device) for one in (self.places, self.owners, self.targets, self.counts)
        )
        return Predictions(places, owners, targets, counts, self.offsets)
