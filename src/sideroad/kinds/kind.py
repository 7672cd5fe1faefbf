"""What a kind of layer tells about itself, so that a method is written once for all of them."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor, nn

Seam = Literal["hook", "owner"]
"""Where a delta joins: after the layer's own forward, or in the forward of the module that reads the layer's weight."""


class Kind(Protocol):
    """One kind of layer: its weight seen as [out, in], the shapes of a pair on it, and the pair's branch."""

    @property
    def name(self) -> str | None:
        """What an adapter calls the kind where PEFT's files name its tensors in a way of their own; else None."""

    @property
    def weight(self) -> str:
        """Name of the parameter that is adapted."""

    @property
    def bias(self) -> str | None:
        """Name of the bias that can be trained beside it; None where none can."""

    @property
    def seam(self) -> Seam:
        """Where a delta on this kind joins."""

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer, called with its input. `all-linear` means those, and fused experts."""

    def claims(self, layer: nn.Module) -> bool:
        """Whether a layer is of this kind: its class, a floating-point weight of the right shape, a plain forward."""

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (out, in) of the weight seen as a matrix."""

    def oriented(self, weight: Tensor) -> Tensor:
        """Return a stored weight as [out, in]; a view where that is possible."""

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return an [out, in] weight in the shape in which the layer stores it."""

    def pair_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B as they are stored and saved."""

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Drop elements of the branch's input at random and scale up the rest.

        Returns:
            The input, and a factor for the branch: what cannot be zeroed in the input (token ids) is zeroed by it.
        """

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Return y + factor · B A x, without calling the layer and without changing y.

        Args:
            x: the layer's input.
            y: the layer's own output, perhaps with other deltas added.
            A: in the shape of `pair_shapes`, in any floating-point dtype; cast here, while x never is.
            B: likewise.
        """

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the layer's weight times x, without a bias and without calling the layer."""

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Return a vector of one value per output in a shape that adds onto the layer's output."""


def own_weight(layer: nn.Module) -> Tensor | None:
    """Return the layer's weight where it is a floating-point parameter of its own; None for packed and parametrised."""
    weight = layer._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None
