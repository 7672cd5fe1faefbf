"""A module trained whole: an adapter's own copy acts in its place."""

from __future__ import annotations

from torch import Tensor, nn


class Replaced(nn.Module):
    """A copy of a module, which is called instead of it while its adapter acts.

    Args:
        copy: of the same class and shapes; its parameters are the adapter's.
    """

    def __init__(self, copy: nn.Module) -> None:
        super().__init__()
        self.copy = copy
        self.shared = False
        """Whether layers tied to this module follow it."""

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module, weight: float) -> Tensor:
        """Return y, which is the copy's own output already: it was called in the module's place (`seams.Seam`)."""
        return y

    def changed(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the dotted names of all tensors of the module; a merge writes each."""
        return tuple(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Return the copy's parameters and buffers, as its state dict names them."""
        return dict(self.copy.state_dict(keep_vars=True))

    def lower(self, layer: nn.Module) -> None:
        """There is no low-rank change; the copy is all."""
