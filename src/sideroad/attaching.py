"""attach: adapters onto a model, in place and removable."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.config import FROM_DATA, FROM_WEIGHT, AdapterConfig, init_name
from sideroad.data_init import Batch, start_from_data
from sideroad.errors import AdapterError, ConfigError, MergeError, TargetError, raise_findings
from sideroad.fitting import fit
from sideroad.handle import Attached
from sideroad.hold import HANDLE
from sideroad.init import draw_seed, start_tensors
from sideroad.joining import Placed, start_rows, state_without_adapters
from sideroad.kinds.experts import layer_at, same_layer
from sideroad.methods import ROWS
from sideroad.methods.objections import objections
from sideroad.mixtures import mixture_notes
from sideroad.peft_keys import BASE
from sideroad.survey import Survey
from sideroad.targets import resolve
from sideroad.tying import find_followers, tying_findings
from sideroad.weights import weight_of

__all__ = ["Attached", "attach", "attached"]

logger = logging.getLogger(__name__)


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
    any_rank: bool = False,
    batches: Iterable[Batch] | None = None,
) -> Attached:
    """Put an adapter on a model, new (from a configuration) or with weights (a value). The base is frozen.

    The layers keep class, weight, names and kernel; parameters appear as `q_proj.lora.<name>.A`. The first adapter
    acts at once; later ones wait for `activate`. Attach before `torch.compile`. A layer whose weight the model uses
    without calling the layer (Mamba's dt_proj) adds nothing unmerged; training refuses it, having no gradient.
    (The projections of `nn.MultiheadAttention` are such layers too, but their owner reads the changed weights.)

    Args:
        model: changed in place; may be on the meta device.
        name: any non-empty text that no attached adapter has.
        seed: of a new adapter's tensors, which then do not depend on device or order; None draws one from torch.
        trainable: whether its parameters require gradients; by default a new adapter's do, a loaded one's do not.
        any_rank: let a new adapter's ranks be larger than a layer, which costs memory and gives nothing.
        batches: arguments of the model's forward, for initialisations that look at data (`eva`, `lora-ga`).
    Returns:
        The model's one handle; a second call returns the same.
    Raises:
        AdapterError: the name is taken or empty, or the tensors do not fit; nothing is changed then.
        TargetError: the configuration's targets do not fit.
        ConfigError: an initialisation looks at data and there are no batches, or the reverse.
        MergeError: adapters are merged, and this one starts from the base's own weights (bias, rows, whole modules).
    """
    handle = attached(model)
    if handle is None:
        if "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None:
            raise AdapterError("this model is compiled; attach first, then call torch.compile.")
        handle = Attached(model)
    model = handle.model
    handle.refuse_name(name)
    _refuse_merged(handle, adapter_or_config)
    if isinstance(adapter_or_config, Adapter):
        placed = _place(handle, adapter_or_config, name)
        description = replace(adapter_or_config, weights={}, modules={})
    else:
        config, placed = _start(handle, adapter_or_config, seed, any_rank, batches)
        description = Adapter(config=config, weights={}, base=None, task_type=_task_type(model))
    wanted = not isinstance(adapter_or_config, Adapter) if trainable is None else trainable
    handle.put(name, description, placed, wanted)
    return handle


def _refuse_merged(handle: Attached, wanted: Adapter | AdapterConfig) -> None:
    """What starts from the base's own weights, is compared with them or follows their ties needs them in place."""
    if not handle.merged_names:
        return
    if isinstance(wanted, Adapter):
        needs = any(leaves.keys() & {ROWS, BASE, "magnitude"} for leaves in wanted.weights.values())
    else:
        needs = wanted.bias != "none" or bool(wanted.modules_to_save or wanted.trainable_tokens)
        needs |= wanted.method.kind == "dora" or init_name(wanted.method.init) in (*FROM_WEIGHT, *FROM_DATA)
    if needs:
        raise MergeError(
            f"{', '.join(handle.merged_names)} is merged, and this adapter starts from the base's own weights (bias, "
            "modules_to_save, trainable_tokens, a magnitude, an init that looks at them) or is compared with them; "
            "unmerge() first."
        )


def _task_type(model: nn.Module) -> str | None:
    """Return the task that PEFT's files name; it chooses a class there that asks the base for what generation needs."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    if "input_ids" not in inspect.signature(type(model).forward).parameters:
        return None  # that class would hand them to a forward that reads sound or pictures
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _place(handle: Attached, value: Adapter, name: str) -> Placed:
    """Fit a value's tensors onto the model as it was last read; read it again if they do not fit, or if it changed."""
    try:
        placed = fit(handle.survey(), value, name)
        known = handle.survey().modules
        if all(same_layer(layer_at(handle.model, path), known[path]) for path in placed.paths):
            return placed
    except (AdapterError, AttributeError):
        pass
    return fit(handle.survey(fresh=True), value, name)


def _start(
    handle: Attached, config: AdapterConfig, seed: int | None, any_rank: bool, batches: Iterable[Batch] | None
) -> tuple[AdapterConfig, Placed]:
    """Resolve a configuration and make the tensors of a new adapter, in model order; data may settle its ranks."""
    survey = handle.survey(fresh=True)
    targets = resolve(survey, config, any_rank=any_rank)
    findings = objections(config, targets, survey.modules)
    if config.method.kind == "dora" or init_name(config.method.init) in FROM_WEIGHT:
        findings += [f"{path} has weights that are NaN or infinite." for path in targets if _broken(survey, path)]
    raise_findings(TargetError, "the method does not fit these layers", findings)
    given: Mapping[str, tuple[Tensor, Tensor]] = {}
    if init_name(config.method.init) in FROM_DATA:
        with handle.disabled():
            found = start_from_data(handle.model, config, targets, batches)
        config, given = found.config, found.pairs
        targets = resolve(survey, config, any_rank=True)
    elif batches is not None:
        raise ConfigError(f"init: {init_name(config.method.init)} looks at no data; leave batches out.")
    biased, rows, whole = set(survey.biases(config, targets)), survey.rows(config, []), survey.whole(config, [])
    for note in mixture_notes(survey, config, targets).covered:
        logger.info("%s", note)
    for note in mixture_notes(survey, config, targets).left:
        logger.warning("%s", note)
    raise_findings(TargetError, "tying", tying_findings(survey, config, [*targets, *rows, *whole]))
    chosen = draw_seed() if seed is None else seed
    tensors = {
        path: start_tensors(targets.get(path), config, chosen, module, bias=path in biased, given=given.get(path))
        for path, module in survey.modules.items()
        if path in targets or path in biased
    }
    tensors |= {path: start_rows(survey.modules[path], ids) for path, ids in rows.items()}
    return config, Placed(
        {path: tensors[path] for path in survey.modules if path in tensors},
        {path: state_without_adapters(survey.modules[path]) for path in whole},
        find_followers(survey, config, tensors, whole),
    )


def _broken(survey: Survey, path: str) -> bool:
    """Whether a layer's weight, which a start or a magnitude is taken from, is not finite."""
    weight = weight_of(survey.modules[path])
    return not weight.is_meta and not bool(torch.isfinite(weight.detach()).all())
