"""The subclasses of PeftModel by task, and the functions that wrap a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from sideroad.attaching import attach
from sideroad.errors import AdapterError, ConfigError
from sideroad.peft.config import LoraConfig
from sideroad.peft.kinds import TaskType
from sideroad.peft.lora_model import LoraModel
from sideroad.peft.model import PeftModel
from sideroad.peft.targeting import adapter_config, adapter_config_at, refuse_foreign, settle
from sideroad.peft_keys import ROOT


class PeftModelForCausalLM(PeftModel):
    """A PeftModel that predicts the next token."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel of an encoder and a decoder."""


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel that classifies sequences; a head called `classifier` or `score` is trained whole."""


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel that classifies tokens; a head called `classifier` or `score` is trained whole."""


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel that finds answers in a text; a head called `qa_outputs` is trained whole."""


class PeftModelForFeatureExtraction(PeftModel):
    """A PeftModel whose hidden states are what is wanted."""


CLASSES: Mapping[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
"""Task → class."""

P = TypeVar("P", bound=PeftModel)


def class_of(config: LoraConfig, asked: type[P]) -> type[P]:
    """Return the class of a configuration's task if `asked` is PeftModel itself, else `asked`."""
    found = CLASSES.get(config.task_type or "", asked)
    return found if asked is PeftModel and issubclass(found, asked) else asked


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model and wrap it; the base is frozen and changed in place, and `unload` gives it back.

    Args:
        peft_config: left as it is; the model keeps a copy, with the targets that were chosen.
        mixed: must be False.
        autocast_adapter_dtype: keep the adapter of a 16-bit base in fp32.
        revision: of the base, to be noted in the configuration.
        low_cpu_mem_usage: without effect; an adapter's tensors are made once, at once.
    Raises:
        ConfigError: wrong or unsupported fields, all of them.
        TargetError: targets that do not fit the model.
        AdapterError: the model has adapters already.
    """
    if mixed:
        raise ConfigError("mixed=True (adapters of several kinds on one model) is not supported; leave it out.")
    refuse_foreign(peft_config)
    if revision is not None:
        peft_config = replace(peft_config, revision=revision)
    return class_of(peft_config, PeftModel)(model, peft_config, adapter_name, autocast_adapter_dtype)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put a new adapter on a model without wrapping it, and return the same model.

    Args:
        low_cpu_mem_usage: without effect.
        state_dict: an adapter's tensors by PEFT's names; their modules are adapted instead of `target_modules`, and
            their values are not used.
    Raises:
        ConfigError, TargetError, AdapterError: as in `get_peft_model`.
    """
    refuse_foreign(peft_config)
    if isinstance(model, PeftModel | LoraModel):
        raise AdapterError("inject_adapter_in_model on a wrapped model; use its add_adapter.")
    if state_dict is None:
        attach(model, adapter_config(settle(peft_config, model), model, autocast=True), adapter_name)
        return model
    paths = [*dict.fromkeys(key.removeprefix(ROOT).rpartition(".lora_")[0] for key in state_dict if ".lora_" in key)]
    if not paths:
        raise AdapterError("the state dict has no lora_A and lora_B, so it names no module to adapt.")
    attach(model, adapter_config_at(peft_config, model, paths, autocast=True), adapter_name)
    return model
