"""PEFT's names over sideroad: a program for LoRA with PEFT runs with its import changed to `sideroad.peft`.

Neither `peft` nor transformers is imported. What is not supported raises by its name; what PEFT accepts in silence and
would not do (names that match nothing, tensors that do not fit) raises too. The names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sideroad.lazy import lazy

if TYPE_CHECKING:
    from sideroad.peft.auto import AutoPeftModel as AutoPeftModel
    from sideroad.peft.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from sideroad.peft.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from sideroad.peft.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from sideroad.peft.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from sideroad.peft.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from sideroad.peft.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from sideroad.peft.config import LoraConfig as LoraConfig
    from sideroad.peft.config import PeftConfig as PeftConfig
    from sideroad.peft.config import get_peft_config as get_peft_config
    from sideroad.peft.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from sideroad.peft.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from sideroad.peft.kinds import PeftType as PeftType
    from sideroad.peft.kinds import TaskType as TaskType
    from sideroad.peft.lora_model import LoraModel as LoraModel
    from sideroad.peft.model import PeftModel as PeftModel
    from sideroad.peft.optimizers import create_lorafa_optimizer as create_lorafa_optimizer
    from sideroad.peft.optimizers import create_loraplus_optimizer as create_loraplus_optimizer
    from sideroad.peft.starts import EvaConfig as EvaConfig
    from sideroad.peft.status import TunerLayerStatus as TunerLayerStatus
    from sideroad.peft.status import TunerModelStatus as TunerModelStatus
    from sideroad.peft.status import get_layer_status as get_layer_status
    from sideroad.peft.status import get_model_status as get_model_status
    from sideroad.peft.tasks import PeftModelForCausalLM as PeftModelForCausalLM
    from sideroad.peft.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from sideroad.peft.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from sideroad.peft.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from sideroad.peft.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from sideroad.peft.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
    from sideroad.peft.tasks import get_peft_model as get_peft_model
    from sideroad.peft.tasks import inject_adapter_in_model as inject_adapter_in_model
    from sideroad.peft.tensors import get_base_model_state_dict as get_base_model_state_dict
    from sideroad.peft.tensors import get_peft_model_state_dict as get_peft_model_state_dict
    from sideroad.peft.tensors import set_base_model_state_dict as set_base_model_state_dict
    from sideroad.peft.tensors import set_peft_model_state_dict as set_peft_model_state_dict

_FILES = {
    "auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "config": ("LoraConfig", "PeftConfig", "get_peft_config"),
    "eva": ("initialize_lora_eva_weights",),
    "kbit": ("prepare_model_for_kbit_training",),
    "kinds": ("PeftType", "TaskType"),
    "lora_model": ("LoraModel",),
    "model": ("PeftModel",),
    "optimizers": ("create_lorafa_optimizer", "create_loraplus_optimizer"),
    "starts": ("EvaConfig",),
    "status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "tasks": (
        "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
        "get_peft_model", "inject_adapter_in_model",
    ),
    "tensors": (
        "get_base_model_state_dict", "get_peft_model_state_dict", "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
}  # fmt: skip

_HOMES = {name: f"{__name__}.{file}" for file, names in _FILES.items() for name in names}

__all__ = sorted(_HOMES)

_load = lazy(__name__, _HOMES)


def __getattr__(name: str) -> object:
    from sideroad.peft.absent import refuse_name

    refuse_name(name)
    return _load(name)


def __dir__() -> list[str]:
    return list(__all__)
