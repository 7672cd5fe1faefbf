"""Where adapters join a model: behind a layer's own forward, or in the forward of the module that owns a weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sideroad.errors import AdapterError
from sideroad.kinds import kind_of
from sideroad.kinds.changed_weight import ChangedWeight, Pair, multiplies
from sideroad.kinds.experts import ExpertWeight, expert_weights, holder_of, layer_at
from sideroad.methods.lora import BiasDelta, LoraDelta, bias_change
from sideroad.methods.replaced import Replaced
from sideroad.route import ByWeight, Deltas, Route, add_child, close_layer, deltas_of, open_layer
from sideroad.rows import Plan


class Seam:
    """Stands in for a module's `forward`; the module keeps its class, names and weights.

    It serves what no hook behind a layer can: a module trained whole, whose copy is called instead, and weights that
    another module's forward reads (projections of `nn.MultiheadAttention`, stacked weights of fused experts): that
    forward sees a view of its module that holds the changed weights. Nothing of the model is written, so threads and
    exceptions leave nothing behind.

    Args:
        owner: the module; its instance attribute `forward` becomes this object.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.plain = owner.__dict__.get("forward")
        """A forward that somebody else had set on the instance; it is put back on closing."""
        # torch's fused encoder layer reads weights without calling the attention, unless a module inside has a hook
        self.mark = owner.register_forward_hook(_nothing)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the live copy, or the class's own forward on the owner or on its changed view."""
        deltas = deltas_of(self.owner)
        plan = None if deltas is None else deltas.route.plan
        if plan is not None and deltas is not None:
            return self._by_rows(plan, deltas, args, kwargs)
        return self._call(None if deltas is None else deltas.route.live, args, kwargs)

    def _call(self, live: Mapping[str, float] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        owner = self.owner
        copied = live_copy(owner, live or {})
        if copied is not None:
            return copied(*args, **kwargs)
        view = changed_view(owner)
        if view is not owner:
            return type(owner).forward(view, *args, **kwargs)
        return type(owner).forward(owner, *args, **kwargs) if self.plain is None else self.plain(*args, **kwargs)

    def _by_rows(self, plan: Plan, deltas: Deltas, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call one copy for each segment of a mixed batch."""
        if not any(key in deltas._modules for key in plan.keys):
            return self._call({}, args, kwargs)
        _refuse_rows(self.owner, deltas, plan)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or _reads_weights(self.owner):
            raise AdapterError(
                f"a mixed batch cannot be split before {type(self.owner).__name__}: only modules trained whole that "
                "are called with one tensor can differ by row. Run one adapter at a time, with using()."
            )
        segments = plan.segments(self.owner, args[0], deltas._modules)
        parts = zip(segments.split(args[0]), segments.weights, strict=True)
        return segments.join([self._call(weights, (x,), {}) for x, weights in parts])


def live_copy(owner: nn.Module, live: Mapping[str, float]) -> nn.Module | None:
    """Return the copy that acts in a module's place, if any; the handle lets at most one be active."""
    deltas = deltas_of(owner)
    found = [] if deltas is None else [deltas._modules.get(key) for key in live]
    return next((delta.copy for delta in found if isinstance(delta, Replaced)), None)


def changed_view(owner: nn.Module) -> nn.Module:
    """Return a shallow copy of a module whose weights hold the live deltas; the module itself where none is live."""
    parameters = _changed_weights(owner)
    children = {}
    # a loop: torch.compile breaks its graph at a comprehension that names what it finds
    for name, child in owner._modules.items():
        # experts inside have a seam of their own
        passed = child is None or isinstance(child, Deltas) or isinstance(child.__dict__.get("forward"), Seam)
        changed = {} if child is None or passed else _changed_weights(child)
        if child is not None and changed:
            children[name] = _view(child, changed)
    return _view(owner, parameters, children) if parameters or children else owner


def open_path(model: nn.Module, path: str, route: Route, *, whole: bool = False) -> Deltas:
    """Return the `lora` child of the module at a path, made and joined to the forward on first use.

    Args:
        whole: the module is trained whole: its forward is taken over, whatever its kind.
    """
    layer = layer_at(model, path)
    if not whole and not _by_owner(layer):
        return open_layer(layer, route)
    module = holder_of(layer)
    present = deltas_of(module) or add_child(module, route)
    _take_over(_owner(model, path, layer))
    return present


def close_path(model: nn.Module, path: str) -> None:
    """Undo `open_path`."""
    layer = layer_at(model, path)
    owner = _owner(model, path, layer)
    close_layer(holder_of(layer))
    seam = owner.__dict__.get("forward")
    if isinstance(seam, Seam) and not _needed(owner):
        _give_back(owner, seam)


def strip(copied: nn.Module) -> nn.Module:
    """Remove every adapter from a copy of a module, and return it."""
    for module in list(copied.modules()):
        close_layer(module)
        seam = module.__dict__.get("forward")
        if isinstance(seam, Seam):
            _give_back(module, seam)
    return copied


def foreign_forward(module: nn.Module) -> Any:
    """Return the forward that somebody else has set on the instance; None where there is none."""
    present = module.__dict__.get("forward")
    return present.plain if isinstance(present, Seam) else present


def _give_back(owner: nn.Module, seam: Seam) -> None:
    del owner.__dict__["forward"]
    if seam.plain is not None:
        owner.__dict__["forward"] = seam.plain
    seam.mark.remove()


def _take_over(owner: nn.Module) -> None:
    if isinstance(owner.__dict__.get("forward"), Seam):
        return
    if "forward" in owner.__dict__ and (isinstance(owner, nn.MultiheadAttention) or expert_weights(owner)):
        raise AdapterError(
            f"the forward of this {type(owner).__name__} was replaced by another library (device hooks?), which would "
            "not see the adapter's weights; attach the adapter first."
        )
    owner.__dict__["forward"] = Seam(owner)


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that changes nothing."""


def _by_owner(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.seam == "owner"


def _reads_weights(owner: nn.Module) -> bool:
    """Whether a module's forward reads weights that adapters change: of an attention, or of fused experts."""
    return _by_owner(owner) or bool(expert_weights(owner))


def _owner(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The module whose forward reads the weight at a path: itself, the attention around it, or the experts."""
    if isinstance(module, ExpertWeight):
        return module.owner
    if isinstance(module, nn.MultiheadAttention) or not _by_owner(module):
        return module
    return model.get_submodule(path.rpartition(".")[0])


def _needed(owner: nn.Module) -> bool:
    inner = [child for child in owner._modules.values() if child is not None and _by_owner(child)]
    return any(deltas_of(module) is not None for module in (owner, *inner))


def _changed_weights(module: nn.Module) -> Mapping[str, Tensor | ChangedWeight]:
    deltas, kind = deltas_of(module), kind_of(module)
    if deltas is None:
        return {}
    if expert_weights(module):
        return _changed_experts(module, deltas)
    if kind is None or kind.seam != "owner":
        return {}
    plan = deltas.route.plan
    if plan is not None:
        _refuse_rows(module, deltas, plan)
    found: dict[str, Tensor] = {}
    for key, factor in deltas.route.live.items():
        delta = deltas._modules.get(key)
        if isinstance(delta, LoraDelta):
            found[kind.weight] = delta.changed_weight(found.get(kind.weight, module.get_parameter(kind.weight)), factor)
        if isinstance(delta, LoraDelta | BiasDelta) and delta.bias is not None:
            change = bias_change(delta.bias, module, factor)
            found["bias"] = found.get("bias", module.get_parameter("bias")).to(change.dtype) + change
    return {name: tensor.to(module.get_parameter(name).dtype) for name, tensor in found.items()}


def _changed_experts(module: nn.Module, deltas: Deltas) -> Mapping[str, Tensor | ChangedWeight]:
    """The stacked weights of an experts module with what is live on them, as products or, where it must be, summed."""
    found: dict[str, Tensor] = {}
    pairs: dict[str, list[Pair]] = {}
    as_products = multiplies(module)
    for key, factor in deltas.route.live.items():
        held = deltas._modules.get(key)
        for name, delta in held._modules.items() if isinstance(held, ByWeight) else ():
            if isinstance(delta, LoraDelta) and as_products:
                pairs.setdefault(name, []).append(delta.expert_pair(module.get_parameter(name), factor))
            elif isinstance(delta, LoraDelta):
                found[name] = delta.changed_weight(found.get(name, module.get_parameter(name)), factor)
    if as_products:
        return {name: ChangedWeight(module.get_parameter(name), several) for name, several in pairs.items()}
    return {name: tensor.to(module.get_parameter(name).dtype) for name, tensor in found.items()}


def _refuse_rows(module: nn.Module, deltas: Deltas, plan: Plan) -> None:
    """Raise AdapterError where a mixed batch names adapters of weights that are one for all its rows."""
    held = [deltas._modules[key] for key in plan.keys if key in deltas._modules]
    if expert_weights(module) and any(isinstance(one, ByWeight) for one in held):
        what, part = "fused experts", "experts"
    elif _by_owner(module) and held:
        what, part = "an attention projection", "attention"
    else:
        return
    raise AdapterError(
        f"rows() names an adapter of {what} ({type(module).__name__}), whose weight is one for "
        f"all rows of a batch. Run one adapter at a time, with using(), or leave the {part} out of its targets."
    )


def _view(
    module: nn.Module, parameters: Mapping[str, Tensor | ChangedWeight], children: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    view = copy.copy(module)
    view.__dict__["_parameters"] = {**module._parameters, **parameters}
    view.__dict__["_modules"] = {**module._modules, **(children or {})}
    view.__dict__.pop("forward", None)
    return view

