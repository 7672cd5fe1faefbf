"""PeftConfig and LoraConfig: PEFT's fields by PEFT's names and with PEFT's defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from sideroad.adapter_files import CONFIG
from sideroad.base.adapters import adapter_directory
from sideroad.errors import AdapterError, ConfigError, did_you_mean, raise_findings
from sideroad.files import json_text, read_json, replace_file
from sideroad.peft.checks import contradictions
from sideroad.peft.kinds import PeftType, TaskType
from sideroad.peft.starts import eva_config, start_findings
from sideroad.peft_adalora import plain_fields
from sideroad.peft_fields import can_start, init_of, sift, unsupported

Names = list[str] | set[str] | tuple[str, ...] | str
"""Several names, or one regular expression."""

UNWRITTEN = ("allow_unmatched", "runtime_config")
"""Fields that no file has: ours, and what holds while a program runs."""


@dataclass
class PeftConfig:
    """What every kind of adapter says about itself. `PeftConfig.from_pretrained` gives the kind that a directory holds.

    Raises:
        ConfigError: unknown fields (with the nearest known one), wrong values and contradictions, all at once.
    """

    task_type: TaskType | str | None = None
    """What the model is for; decides the subclass of `PeftModel`."""
    peft_type: PeftType | str | None = None
    """Kind of adapter; `LORA` is the one there is."""
    auto_mapping: dict[str, Any] | None = None
    """Class and library of the base, where no task says which class loads it; set when the adapter is saved."""
    peft_version: str | None = None
    """Kept where a file has it, never set."""
    base_model_name_or_path: str | None = None
    """The base this adapter is for."""
    revision: str | None = None
    """Revision of the base."""
    inference_mode: bool = False
    """Whether the adapter is to be frozen; always true in files."""

    def __new__(cls, *args: Any, **fields_given: Any) -> Self:
        """Refuse unknown fields before the dataclass would, by their names and with the nearest known one."""
        known = [one.name for one in fields(cls)]
        unknown = [
            f'{cls.__name__} has no field "{name}".{did_you_mean(name, known)}'
            for name in fields_given
            if name not in known
        ]
        raise_findings(ConfigError, f"{cls.__name__} cannot be made", unknown)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            guess = did_you_mean(str(self.task_type).upper(), list(TaskType))
            raise ConfigError(f"task_type is {self.task_type!r}; allowed: {', '.join(TaskType)}, or None.{guess}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json into a directory, which is made if needed: sorted keys, every field.

        `PeftModel.save_pretrained` writes a smaller one, of what differs from the defaults.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / CONFIG, json_text(written(self)).encode())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> LoraConfig:
        """Read adapter_config.json of a local directory, or of a repository on the hub.

        Raises:
            AdapterError: no such directory or repository, or a file that cannot be honoured.
        """
        place = pretrained_model_name_or_path
        directory = adapter_directory(place, subfolder=subfolder, revision=revision, token=token)
        return LoraConfig.from_file(read_json(directory / CONFIG), str(directory / CONFIG))

    @classmethod
    def from_peft_type(cls, **fields_given: Any) -> PeftConfig:
        """Make the kind of configuration that `peft_type` names (this class's kind where it is not given)."""
        kind = fields_given.get("peft_type")
        if kind is None:
            return cls(**fields_given)
        if kind != PeftType.LORA:
            raise_findings(ConfigError, "the configuration", sift(fields_given, source="peft_type")[1][:1])
        return LoraConfig(**fields_given)

    @property
    def is_prompt_learning(self) -> bool:
        """False: no kind of adapter here is a soft prompt."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: no kind of adapter here is an adaption prompt."""
        return False


@dataclass
class LoraConfig(PeftConfig):
    """Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) in PEFT's words; mutable, checked again when used.

    Every field of PEFT's is known. One that would change the mathematics in a way that is not supported raises when it
    is set, by its name. `allow_unmatched` is ours: without it every name must match at least one module.
    """

    r: int = 8
    """Rank."""
    target_modules: Names | None = None
    """Names (exact, or a dotted end of a path); a string is one regular expression for the whole path;
    "all-linear"; None chooses by the names of the model's layers."""
    exclude_modules: Names | None = None
    """The same, to leave out."""
    lora_alpha: float = 8
    """The scale is lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of zeroing an element of the branch's input while training."""
    fan_in_fan_out: bool = False
    """Without effect: how a layer stores its weight is known from its class."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train: none, all, those of adapted layers. Each adapter has its own; the base's stay."""
    use_rslora: bool = False
    """The scale is lora_alpha / sqrt(r)."""
    modules_to_save: list[str] | None = None
    """Names of modules trained whole."""
    init_lora_weights: bool | str = True
    """Start: True (B = 0), "gaussian" (the same, A gaussian), False (A and B at random); "pissa", "pissa_niter_16",
    "olora" from the weight, whose part is subtracted again, so that the base stays as it is; "eva" from data:
    B = 0 until `initialize_lora_eva_weights`."""
    layers_to_transform: list[int] | int | None = None
    """Blocks to adapt, counted from 0."""
    layers_pattern: Names | None = None
    """Name of the block list, with `layers_to_transform`."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """Regular expression for the end of a path → rank."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    """Regular expression for the end of a path → lora_alpha."""
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows are trained; a mapping names the embeddings."""
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    """Options of the start "eva": an `EvaConfig`, or its fields."""
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    """A learned magnitude for every output beside the pair (DoRA, arXiv:2402.09353)."""
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    """Names of the stacked weights of fused experts (`experts.gate_up_proj`): exact, or a dotted end of a path."""
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False
    allow_unmatched: bool = False
    """Ours: pass over names that match no module."""

    def __post_init__(self) -> None:
        self.check()
        self._settle()
        if self.init_lora_weights == "eva":
            self.eva_config = eva_config(self.eva_config)

    def check(self) -> None:
        """Check all fields as for a new adapter.

        Raises:
            ConfigError: everything that is wrong, contradictory or not supported, each field by its name.
        """
        said = vars(self)
        findings = [*contradictions(said), *unsupported(said), *start_findings(said)]
        raise_findings(ConfigError, "LoraConfig cannot be used", findings)

    @classmethod
    def from_file(cls, content: Mapping[str, Any], source: str) -> LoraConfig:
        """Return the configuration that an adapter_config.json holds, of an adapter that is finished.

        How it was started says nothing any more, so the starts that a new adapter cannot have may stand here.

        Raises:
            AdapterError: fields that change the adapter and are not supported, all at once.
        """
        content = plain_fields(content)
        findings = sift(content, source=source)[1]
        if not can_start(content.get("init_lora_weights", True)):
            findings += init_of(content, {}, source)[1]
        content = {**content, "target_modules": content.get("target_modules") or None}
        wrong = contradictions({**_defaults(), **content, "peft_type": None})
        raise_findings(AdapterError, f"{source} cannot be used", [*findings, *(f"{source}: {one}" for one in wrong)])
        config = cls.__new__(cls)
        known = {one.name for one in fields(cls)}
        vars(config).update({**_defaults(), **{name: value for name, value in content.items() if name in known}})
        config._settle()
        return config

    def _settle(self) -> None:
        self.peft_type = PeftType.LORA
        self.task_type = TaskType(self.task_type) if self.task_type in list(TaskType) else self.task_type
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) and _hashable(value) else value)


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Make a configuration from plain fields, `peft_type` among them.

    Raises:
        ConfigError: as in `LoraConfig`; and where `peft_type` is missing.
    """
    if "peft_type" not in config_dict:
        raise ConfigError('the fields have no peft_type, so their kind is not known; add "peft_type": "LORA".')
    return PeftConfig.from_peft_type(**config_dict)


def plain(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as JSON can hold them: sets as sorted lists, enum members as their words."""
    return {
        name: sorted(value) if isinstance(value, set) else str(value) if isinstance(value, str) else value
        for name, value in said.items()
    }


def written(config: PeftConfig) -> dict[str, Any]:
    """Return all fields that a file holds, as JSON can hold them."""
    return {name: value for name, value in plain(config.to_dict()).items() if name not in UNWRITTEN}


def _defaults() -> dict[str, Any]:
    return vars(LoraConfig())


def _hashable(value: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(item, str) for item in value)
