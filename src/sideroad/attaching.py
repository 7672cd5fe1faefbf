"""attach: adapters onto a model, in place and removable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.fitting import fit
from sideroad.handle import Attached
from sideroad.hold import HANDLE
from sideroad.init import draw_seed, start_tensors
from sideroad.targets import Survey, bias_paths, resolve

__all__ = ["Attached", "attach", "attached"]


def attached(model: nn.Module) -> Attached | None:
    """Return the handle of a model that has adapters, or None; a copy of a model has a handle of its own."""
    handle = getattr(model, HANDLE, None)
    return handle if isinstance(handle, Attached) else None


def attach(
    model: nn.Module,
    adapter_or_config: Adapter | AdapterConfig,
    name: str = "default",
    *,
    seed: int | None = None,
    trainable: bool | None = None,
) -> Attached:
    """Put an adapter on a model, new (from a configuration) or with weights (a value). The base is frozen.

    The layers keep class, weight, names and kernel; parameters appear as `q_proj.lora.<name>.A`. The first adapter
    acts at once; later ones wait for `activate`. Attach before `torch.compile`. A layer whose weight the model uses
    without calling the layer (Mamba's dt_proj) adds nothing unmerged; training refuses it, having no gradient.

    Args:
        model: changed in place; may be on the meta device.
        name: any non-empty text that no attached adapter has.
        seed: of a new adapter's tensors, which then do not depend on device or order; None draws one from torch.
        trainable: whether its parameters require gradients; by default a new adapter's do, a loaded one's do not.
    Returns:
        The model's one handle; a second call returns the same.
    Raises:
        AdapterError: the name is taken or empty, or the tensors do not fit; nothing is changed then.
        TargetError: the configuration's targets do not fit.
    """
    handle = attached(model)
    if handle is None:
        if "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None:
            raise AdapterError("this model is compiled; attach first, then call torch.compile.")
        handle = Attached(model)
    model = handle.model
    handle.refuse_name(name)
    if isinstance(adapter_or_config, Adapter):
        tensors: Mapping[str, Mapping[str, Tensor]] = fit(Survey(model), adapter_or_config, name)
        description = replace(adapter_or_config, weights={})
    else:
        tensors = _start(model, adapter_or_config, seed)
        description = Adapter(config=adapter_or_config, weights={}, base=None)
    targets = [path for path, parts in tensors.items() if parts.keys() - {"bias"}]
    wanted = not isinstance(adapter_or_config, Adapter) if trainable is None else trainable
    handle.put(name, description, targets, tensors, wanted)
    return handle


def _start(model: nn.Module, config: AdapterConfig, seed: int | None) -> dict[str, dict[str, Tensor]]:
    """Resolve a configuration and draw the tensors of a new adapter, in model order."""
    targets = resolve(model, config)
    biased = set(bias_paths(model, config, targets))
    modules = Survey(model).modules
    chosen = draw_seed() if seed is None else seed
    return {
        path: start_tensors(targets.get(path), config.method.init, chosen, module, bias=path in biased)
        for path, module in modules.items()
        if path in targets or path in biased
    }
