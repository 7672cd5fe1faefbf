"""EVA's start: pairs and ranks of an adapter of a PeftModel from what enters its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import EvaInit
from sideroad.data_init import FoundStart, start_from_data
from sideroad.errors import AdapterError, ConfigError, MergeError, TargetError, raise_findings
from sideroad.methods.objections import objections
from sideroad.peft.config import LoraConfig
from sideroad.peft.lora_model import LoraModel
from sideroad.peft.starts import EvaConfig, eva_config
from sideroad.peft.targeting import adapter_config
from sideroad.peft.unwrapping import tuner_of
from sideroad.peft_targets import their_patterns
from sideroad.targets import alpha_of, rank_of, resolve


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter of `init_lora_weights="eva"` from data (EVA, arXiv:2410.07170): its ranks and every A; B is 0.

    Call it before the optimizer is made: where ranks change, parameters are new ones. All batches are looked at, once.
    A layer that gets no rank loses its pair.

    Args:
        model: a PeftModel.
        dataloader: batches of arguments for the model's forward, on its device; `attention_mask` and `labels` say which
            tokens count.
        show_progress_bar: without effect.
    Raises:
        ConfigError: another start than "eva", or no batches.
        AdapterError: no PeftModel, an unknown name, or several adapters that act.
        MergeError: adapters are merged.
        TargetError: a layer that no batch reaches, or that is not linear.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise AdapterError(f"this {type(model).__name__} is no PeftModel; use sideroad.attach(..., batches=[...]).")
    config, handle = tuner.peft_config[tuner.known(adapter_name)[0]], tuner.handle
    if config.init_lora_weights != "eva":
        raise ConfigError(f"init_lora_weights of \"{adapter_name}\" is {config.init_lora_weights!r}; it must be 'eva'.")
    if tuner.merged_adapters:
        raise MergeError(f"{', '.join(tuner.merged_adapters)} is merged; call unmerge_adapter() first.")
    options = eva_config(config.eva_config)
    batches = [_counted(batch, options) for batch in dataloader]
    live = handle.adapter(adapter_name)
    init = EvaInit(batches=max(len(batches), 1), rho=options.rho)
    wanted = live.config.model_copy(update={"method": live.config.method.model_copy(update={"init": init})})
    targets = resolve(handle.survey(), wanted, any_rank=True)
    layers = handle.survey().modules
    wrong = objections(wanted, targets, layers)
    raise_findings(TargetError, "EVA does not fit these layers", wrong)
    with handle.disabled():
        found = start_from_data(handle.model, wanted, targets, batches)
    settled = _with_ranks(config, found, everything=len(found.pairs) == len(targets))
    value = replace(
        live,
        config=adapter_config(settled, tuner.model, autocast=True).model_copy(update={"dtype": live.config.dtype}),
        weights=_started(live, found.pairs),
    )
    _put_again(tuner, adapter_name, value, live)
    tuner.peft_config[adapter_name] = settled


def _counted(batch: Mapping[str, Any], options: EvaConfig) -> dict[str, Any]:
    """Return a batch whose labels, where it has one for each token, say which tokens count, as the options do."""
    told = dict(batch)
    labels, ids, mask = (batch.get(name) for name in ("labels", "input_ids", "attention_mask"))
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
        return told
    if not options.use_label_mask:
        del told["labels"]
        return told
    counts = labels != options.label_mask_value
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counts &= mask.bool()
    told["labels"] = labels.masked_fill(labels == -100, 0).masked_fill(~counts, -100)
    return told


def _with_ranks(config: LoraConfig, found: FoundStart, *, everything: bool) -> LoraConfig:
    """Return a configuration that says the ranks that data have settled, every layer's scale staying what it was.

    Args:
        everything: whether all layers have kept a pair; if not, the others are named.
    """
    paths = list(found.pairs)
    ranks = their_patterns({}, {path: rank_of(found.config, path) for path in paths}, config.r)
    alphas = their_patterns({}, {path: alpha_of(found.config, path) for path in paths}, config.lora_alpha)
    settled = replace(config, rank_pattern=ranks, alpha_pattern=alphas)
    if everything:
        return settled
    fields: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return replace(settled, target_modules=set(paths), **fields)


def _started(live: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Return an adapter's tensors with these pairs; where there is none, what else was trained there is left."""
    weights: dict[str, Mapping[str, Tensor]] = {}
    for path, leaves in live.weights.items():
        if path in pairs:
            weights[path] = {**leaves, "A": pairs[path][0], "B": pairs[path][1]}
        elif "A" not in leaves:
            weights[path] = leaves
        elif "bias" in leaves and live.config.bias == "all":
            weights[path] = {"bias": leaves["bias"]}
    return weights


def _put_again(tuner: LoraModel, name: str, value: Adapter, before: Adapter) -> None:
    """Put an adapter in the place of one that is there, trained as that one was; if it does not fit, all stays."""
    handle = tuner.handle
    trained = any(one.requires_grad for one in handle.parameters(name).values())
    handle.detach(name)
    try:
        attach(tuner.model, value, name, trainable=trained)
    except BaseException:
        attach(tuner.model, before, name, trainable=trained)
        raise
    finally:
        tuner.choose_again()
