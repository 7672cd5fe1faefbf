"""What takes the place of a module's forward on the fast path; each falls back to the module's own by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from sideroad.kernels.gated_mlp import gated_mlp
from sideroad.kernels.live import projection_of
from sideroad.kernels.pieces import Pieces
from sideroad.kernels.products import Projection, dropped
from sideroad.kernels.projections import project
from sideroad.kernels.rms_norm import rms_norm
from sideroad.kernels.structure import Gated, Norm
from sideroad.route import deltas_of


class Family:
    """Linear layers that read one input: the first one called computes them all, the others find theirs ready.

    Args:
        layers: in the order in which the model calls them.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._held: Held | None = None
        """One value, so that a thread that meets another's finds that the input is not its own."""

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of one layer, its adapters included."""
        held = self._held
        if index and held is not None and held.input is x and held.version == x._version:
            ready = held.ready.pop(index, None)
            if not held.ready:
                self._held = None
            if ready is not None:
                return ready
        self._held = None
        # only the first asks for the others' outputs: they may not be wanted, or be wanted of another input
        wanted = self.layers if index == 0 else (self.layers[index],)
        now = [projection_of(layer) for layer in wanted]
        ready_now = [one for one in now if not isinstance(one, str)]
        if isinstance(now[0], str) or strided_dropout(x, ready_now):
            return itself(wanted[0], x)
        if len(ready_now) < len(now):
            return project(x, ready_now[:1])[0]
        first, *others = project(x, ready_now)
        if others:
            self._held = Held(x, x._version, dict(enumerate(others, start=1)))
        return first


class Held(NamedTuple):
    """Outputs that wait for their layers to be called."""

    input: Tensor
    version: int
    ready: dict[int, Tensor]


def strided_dropout(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether masks would be drawn for an input that lies in memory in another order than its rows."""
    return dropped(projections) and not x.is_contiguous()


class FastLinear:
    """The forward of one layer of a family."""

    adds_deltas = True
    """The layer's own hook need not."""

    def __init__(self, family: Family, index: int) -> None:
        self.family = family
        self.index = index

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the layer's output, adapters included."""
        (x,) = args or kwargs.values()
        return self.family.output(self.index, x)


class FastNorm:
    """The forward of an RMSNorm."""

    def __init__(self, norm: Norm, pieces: Pieces) -> None:
        self.norm = norm
        self.pieces = pieces

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised rows."""
        x = hidden_states
        return rms_norm(x, self.norm.weight, self.norm.eps, self.norm.style, self.pieces)


class FastGatedMlp:
    """The forward of a gated feed-forward block."""

    def __init__(self, block: nn.Module, gated: Gated, pieces: Pieces) -> None:
        self.block = block
        self.gated = gated
        self.pieces = pieces
        self.layers = [block.get_submodule(name) for name in (gated.gate, gated.up, gated.down)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, adapters included."""
        found = [projection_of(layer) for layer in self.layers]
        gate, up, down = found
        if kwargs or len(args) != 1 or isinstance(gate, str) or isinstance(up, str) or isinstance(down, str):
            return type(self.block).forward(self.block, *args, **kwargs)
        # masks are drawn in the order in which the block calls its layers, and its own forward keeps that
        if strided_dropout(args[0], (gate, up, down)) or (dropped((gate, up)) and not self.gated.gate_first):
            return type(self.block).forward(self.block, *args, **kwargs)
        return gated_mlp(args[0], gate, up, down, self.gated.activation, self.pieces)


def itself(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's output with its adapters as the hook adds them."""
    y = type(layer).forward(layer, x)
    deltas = deltas_of(layer)
    added: Tensor = y if deltas is None else deltas(layer, x, y)
    return added
