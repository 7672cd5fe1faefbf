"""AutoPeftModel and its kin: an adapter's directory to its base with the adapter on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sideroad.adapter_files import MANIFEST
from sideroad.base.adapters import adapter_directory
from sideroad.base.auto_classes import auto_class
from sideroad.errors import AdapterError
from sideroad.files import read_json
from sideroad.peft.config import LoraConfig, PeftConfig
from sideroad.peft.model import PeftModel
from sideroad.peft.tasks import (
    CLASSES,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from sideroad.vocabulary import RECIPE


class AutoPeftModel:
    """Loads the base that an adapter was made for, and puts the adapter on it. Only `from_pretrained` is used.

    This class is for adapters without a task; their configuration names the class of their base in `auto_mapping`,
    which must be one of transformers'.
    """

    base_class: str | None = None
    """transformers' class that loads the base; None takes it from the configuration."""
    peft_class: type[PeftModel] = PeftModel
    """Our class around it."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base and adapter. If a tokenizer beside the adapter has more tokens than the base, that is made larger.

        Args:
            pretrained_model_name_or_path: a local directory with an adapter, or a repository's name on the hub.
            config: to be used in place of the directory's own.
            revision: of that repository. The base's is in the configuration.
            kwargs: for the base's `from_pretrained`, such as `torch_dtype` or `device_map`.
        Raises:
            AdapterError: as in `PeftModel.from_pretrained`; no base named; an adapter for another task.
        """
        place = adapter_directory(pretrained_model_name_or_path, revision=revision, token=kwargs.get("token"))
        said = config or PeftConfig.from_pretrained(place)
        wanted = CLASSES.get(said.task_type or "")
        if wanted is not None and wanted is not cls.peft_class:
            raise AdapterError(
                f"this adapter's task is {said.task_type}; load it with Auto{wanted.__name__}, not {cls.__name__}."
            )
        if said.base_model_name_or_path is None:
            raise AdapterError(
                f"{pretrained_model_name_or_path} does not say its base (base_model_name_or_path); load the base "
                "yourself and use PeftModel.from_pretrained(base, directory)."
            )
        loader = auto_class(cls.base_class) if cls.base_class else _named_class(said)
        model = loader.from_pretrained(said.base_model_name_or_path, revision=said.revision or "main", **kwargs)
        _grow(model, place)
        return cls.peft_class.from_pretrained(
            model,
            place,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For adapters of causal language models."""

    base_class, peft_class = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For adapters of encoder-decoder models."""

    base_class, peft_class = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For adapters of models that classify sequences."""

    base_class, peft_class = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For adapters of models that classify tokens."""

    base_class, peft_class = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For adapters of models that find answers."""

    base_class, peft_class = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For adapters of models whose hidden states are wanted."""

    base_class, peft_class = "AutoModel", PeftModelForFeatureExtraction


def _named_class(config: LoraConfig) -> Any:
    said = config.auto_mapping or {}
    name, library = said.get("base_model_class"), str(said.get("parent_library"))
    if not name or library.partition(".")[0] != "transformers":
        raise AdapterError(
            f"the configuration does not say a class of transformers for its base (auto_mapping: {said or None}); use "
            "the class of its task, or load the base yourself and use PeftModel.from_pretrained(base, directory)."
        )
    return auto_class(str(name))


def _grow(model: Any, directory: Path) -> None:
    manifest = read_json(directory / MANIFEST) if (directory / MANIFEST).exists() else {}
    if RECIPE in manifest:
        return  # the adapter says itself how large the vocabulary is
    if (directory / "tokenizer_config.json").exists() and hasattr(model, "get_input_embeddings"):
        count = len(auto_class("AutoTokenizer").from_pretrained(directory))
        if count > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(count)
