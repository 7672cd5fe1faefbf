"""Where a new adapter starts, in PEFT's words: EVA's options, and what does not go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from sideroad.errors import ConfigError, did_you_mean, raise_findings


@dataclass
class EvaConfig:
    """Options of `init_lora_weights="eva"` (EVA, Paischer et al. 2024, arXiv:2410.07170), with PEFT's defaults.

    Raises:
        ConfigError: values that are wrong, or that are not supported.
    """

    rho: float = 2.0
    """Largest rank of a layer as a multiple of `r`; the sum of all ranks stays the same. 1 leaves ranks alone."""
    tau: float = 0.99
    """Without effect: the decomposition here is exact, over all batches once, and needs no threshold to stop."""
    use_label_mask: bool = True
    """Look only at tokens that are trained on: those whose label is not `label_mask_value`."""
    label_mask_value: int = -100
    """Label of the tokens that are left out."""
    whiten: bool = False
    """Must be False: directions keep length 1."""
    adjust_scaling_factors: bool = True
    """Must be True: every layer's scale stays what it was, whatever its rank becomes."""

    def __post_init__(self) -> None:
        raise_findings(ConfigError, "EvaConfig cannot be used", list(_values(self)))


def eva_config(said: object) -> EvaConfig:
    """Return `eva_config` in any of its forms as ours: None, fields, our class or PEFT's.

    Raises:
        ConfigError: unknown fields, wrong values, or something else.
    """
    if said is None or isinstance(said, EvaConfig):
        return said or EvaConfig()
    if is_dataclass(said) and not isinstance(said, type):
        said = asdict(said)
    if not isinstance(said, Mapping):
        raise ConfigError(f"eva_config is {said!r}; expected an EvaConfig, its fields, or None.")
    known = [one.name for one in fields(EvaConfig)]
    unknown = [name for name in said if name not in known]
    findings = [f'EvaConfig has no field "{name}".{did_you_mean(str(name), known)}' for name in unknown]
    raise_findings(ConfigError, "eva_config cannot be used", findings)
    return EvaConfig(**said)


def start_findings(said: Mapping[str, Any]) -> list[str]:
    """List what is wrong with how a new adapter is to start.

    Args:
        said: all fields of a LoraConfig by PEFT's names.
    """
    findings, init = [], said["init_lora_weights"]
    if said["eva_config"] is not None and init != "eva":
        findings.append(f"eva_config is set, but init_lora_weights is {init!r}; set that to 'eva', or leave it out")
    elif said["eva_config"] is not None:
        try:
            eva_config(said["eva_config"])
        except ConfigError as error:
            findings.append(str(error))
    more = "use_dora" if said["use_dora"] is True else "init_lora_weights" if init in _SUBTRACTED else None
    if said["ensure_weight_tying"] is True and more:
        findings.append(
            f"ensure_weight_tying is set, and {more} is {said[more]!r}: a tied head follows its embedding's plain "
            "pair, and this one is more than that. Leave one of them out"
        )
    return findings


_SUBTRACTED = ("pissa", "pissa_niter_16", "olora")


def _values(said: EvaConfig) -> Iterator[str]:
    for name, most, what in (("rho", math.inf, "1 or more"), ("tau", 1, "a number from 0 to 1")):
        value = getattr(said, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (1 if name == "rho" else 0) <= value <= most:
            yield f"eva_config.{name} is {value!r}; expected {what}"
    for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
        if not isinstance(getattr(said, name), bool):
            yield f"eva_config.{name} is {getattr(said, name)!r}; expected True or False"
    if said.whiten is True:
        yield "eva_config.whiten is set: directions divided by their strength, which is not supported yet; leave it out"
    if said.adjust_scaling_factors is False:
        yield (
            "eva_config.adjust_scaling_factors is False: scales that change with the ranks, which is not supported "
            "yet; leave it out"
        )
