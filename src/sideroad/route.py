"""Which adapters act: one shared Route, and on every adapted layer a child module `lora` and a hook that asks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import enumerate as enumerate_threads
from threading import get_ident
from typing import Any, cast
from urllib.parse import unquote

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sideroad.errors import AdapterError
from sideroad.kinds.experts import ExpertWeight, holder_of, layer_at
from sideroad.rows import Plan

CHILD = "lora"
"""Name of the child module on an adapted layer."""

Names = str | Sequence[str] | Mapping[str, float]
"""One adapter, several (weight 1 each), or several with their weights; an empty sequence means none."""


class Route:
    """Adapter key → weight, shared by all layers of a model, so that a switch is one assignment.

    A copy of the model copies its route once: the copy's layers share the copy.
    """

    def __init__(self) -> None:
        self.live: dict[str, float] = {}
        """What the hooks add to every row, by key; nothing while disabled, merged, or by rows."""
        self.plan: Plan | None = None
        """What the hooks add row by row; None outside `rows` blocks."""
        self.off = False
        """The base was asked for, by an open `disabled` block."""
        self.depth = 0
        """Open `kept` blocks."""
        self._holder: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside a block keeps what acts there; the block itself stays with the original."""
        return {**self.__dict__, "off": False, "depth": 0, "_holder": {}}

    def switch(self, weights: Mapping[str, float]) -> None:
        """Let exactly these adapters act, given by name.

        Raises:
            AdapterError: another thread has an open block.
        """
        self.refuse_strangers()
        self.live = by_key(weights)
        self.plan, self.off = None, False

    def switch_rows(self, plan: Plan) -> None:
        """Let the adapters of a plan act, each on its rows, inside a `kept` block.

        Raises:
            AdapterError: a `disabled` block asks for the base.
        """
        if self.off:
            raise AdapterError(
                "rows() inside a disabled() block: the one names adapters, the other asks for the base; leave one out."
            )
        self.live, self.plan = {}, plan

    def silence(self) -> None:
        """Let none act, until the `kept` block around it is left or another choice is made."""
        self.live, self.plan, self.off = {}, None, True

    def drop(self, key: str) -> None:
        """Forget one adapter."""
        self.live = {one: weight for one, weight in self.live.items() if one != key}
        self.plan = self.plan and self.plan.without(key)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the present state when the block is left, whatever happened inside.

        Raises:
            AdapterError: another thread has an open block; if both restored what they found, one would win for good.
        """
        self._forget_the_dead()
        # one dictionary operation, so that two threads cannot both find it empty
        self._holder.setdefault("thread", get_ident())
        self.refuse_strangers()
        before = self.live, self.plan, self.off, self.depth
        try:
            self.depth += 1
            yield
        finally:
            self.live, self.plan, self.off, self.depth = before
            if not self.depth:
                self._holder.clear()

    def _forget_the_dead(self) -> None:
        """Let go of a block whose thread has ended without leaving it; what acted in it goes on acting."""
        if self._holder and self._holder.get("thread") not in {thread.ident for thread in enumerate_threads()}:
            self._holder.clear()
            self.depth = 0

    def refuse_strangers(self) -> None:
        """Raise AdapterError if another thread than this one has an open block."""
        self._forget_the_dead()
        if self._holder.get("thread", get_ident()) != get_ident():
            raise AdapterError(
                "another thread is inside a using(), rows() or disabled() block of this model. Which adapters act is "
                "one state for all threads: let one thread switch, or give each thread a copy of the model."
            )


class Deltas(nn.Module):
    """The adapters of one layer, by key; a child of that layer."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.handle: RemovableHandle | None = None
        self.inside = False
        """Whether the layer's forward was taken over by one that adds the deltas itself; the hook then adds none."""

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus every live delta, or, inside a `rows` block, each row plus its own.

        Args:
            layer: the adapted layer, which must not be called from here.
            x: its input, [..., in].
            y: its own output, [..., out].
        """
        plan = self.route.plan
        if plan is None:
            return self._add(layer, x, y, self.route.live)
        segments = plan.segments(layer, x, self._modules)
        parts = zip(segments.split(x), segments.split(y), segments.weights, strict=True)
        return segments.join([self._add(layer, *part) for part in parts])

    def _add(self, layer: nn.Module, x: Tensor, y: Tensor, weights: Mapping[str, float]) -> Tensor:
        for key, weight in weights.items():
            delta = self._modules.get(key)
            if delta is not None:
                y = delta(x, y, layer, weight)
        return y

    def put(self, key: str, delta: nn.Module, weight: str | None = None) -> None:
        """Register a delta; it takes over this module's training flag.

        Args:
            weight: name of the stacked weight that it is for, where the layer is an experts module.
        """
        # not add_module: it refuses names that are attributes, which escaped keys never are, and dots, which they lack
        if weight is None:
            self._modules[key] = delta.train(self.training)
            return
        held = self._modules.setdefault(key, ByWeight().train(self.training))
        cast(ByWeight, held)._modules[weight] = delta.train(self.training)

    def take(self, key: str, weight: str | None = None) -> None:
        """Remove a delta, if it is there; arguments as in `put`."""
        held = self._modules.get(key)
        if weight is None or not isinstance(held, ByWeight):
            self._modules.pop(key, None)
            return
        held._modules.pop(weight, None)
        if not held._modules:
            del self._modules[key]


class ByWeight(nn.Module):
    """One adapter's deltas on the stacked weights of an experts module, by the weights' names."""


def add_deltas(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
    """The forward hook of every adapted layer (a module-level function, so that models stay picklable)."""
    deltas = cast(Deltas, layer.lora)
    if deltas.inside:
        return y
    x = args[0] if args else next(iter(kwargs.values()))
    return cast(Tensor, deltas(layer, x, y))


def deltas_of(layer: nn.Module) -> Deltas | None:
    """Return the layer's `lora` child, or None where the layer is not adapted."""
    child = layer._modules.get(CHILD)
    return child if isinstance(child, Deltas) else None


def find_delta(model: nn.Module, path: str, name: str) -> nn.Module:
    """Return the delta that an adapter has on the layer at that path.

    Raises:
        AdapterError: there is none, though the adapter was attached to it.
    """
    layer = layer_at(model, path)
    deltas = deltas_of(holder_of(layer))
    delta = deltas._modules.get(escape(name)) if deltas is not None else None
    if isinstance(layer, ExpertWeight) and delta is not None:
        delta = delta._modules.get(layer.name)
    if delta is None:
        raise AdapterError(f'adapter "{name}" is gone from {path}: the layer was replaced after attach.')
    return delta


def add_child(layer: nn.Module, route: Route) -> Deltas:
    """Give the layer its `lora` child."""
    deltas = Deltas(route)
    deltas.train(layer.training)
    deltas.inside = getattr(layer.__dict__.get("forward"), "adds_deltas", False)
    layer.add_module(CHILD, deltas)
    return deltas


def open_layer(layer: nn.Module, route: Route) -> Deltas:
    """Return the layer's `lora` child, made and hooked on first use."""
    deltas = deltas_of(layer)
    if deltas is None:
        deltas = add_child(layer, route)
    if deltas.handle is None:
        # the handle is kept inside the model: unpickling it reserves its id, so that later hooks do not overwrite ours
        deltas.handle = layer.register_forward_hook(add_deltas, with_kwargs=True)
    return deltas


def close_layer(layer: nn.Module) -> None:
    """Remove the layer's `lora` child and hook."""
    deltas = deltas_of(layer)
    if deltas is not None:
        if deltas.handle is not None:
            deltas.handle.remove()
        delattr(layer, CHILD)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for every module but ours, a shared module once under each of its paths."""
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
        pending.extend((name, child) for name, child in reversed(children) if not isinstance(child, Deltas))


def escape(name: str) -> str:
    """Turn an adapter's name into a module key: no dots, and never the name of an attribute."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if hasattr(Deltas, key) or key in _INSTANCE else key


def unescape(key: str) -> str:
    """Return the adapter name behind a module key."""
    return unquote(key)


def read_weights(names: Names) -> dict[str, float]:
    """Return name → weight for any way of naming adapters."""
    if isinstance(names, Mapping):
        return {name: float(weight) for name, weight in names.items()}
    return dict.fromkeys([names] if isinstance(names, str) else names, 1.0)


def by_key(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the same weights by module key."""
    return {escape(name): weight for name, weight in weights.items()}


_INSTANCE = frozenset(vars(Deltas(Route())))
