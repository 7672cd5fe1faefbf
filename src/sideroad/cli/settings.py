"""Options and `--set key=value` written into the values of a recipe's sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from sideroad.base.config import BaseConfig
from sideroad.config import AdapterConfig, Settings
from sideroad.data.config import DataConfig
from sideroad.errors import ConfigError, did_you_mean, raise_findings
from sideroad.train.evaluate_config import EvaluateConfig
from sideroad.train.recipe import parse_value


class Adapted(Settings):
    """The sections of a recipe that `targets` reads."""

    base: BaseConfig
    adapter: AdapterConfig = AdapterConfig()


class Scored(Settings):
    """The sections of a recipe that `evaluate` reads; `data.train` is what gets scored."""

    data: DataConfig
    evaluate: EvaluateConfig = EvaluateConfig()


def change(
    values: dict[str, Any], options: Sequence[tuple[str, Any]], overrides: Sequence[str]
) -> dict[str, Any]:
    """Write options (dotted key, value), then `key.key=value` texts, into `values`; returns it.

    Raises:
        ConfigError: every override that has no value, is no YAML, or begins with none of the sections in `values`.
    """
    findings, changes = [], list(options)
    for item in overrides:
        key, equals, text = item.partition("=")
        section = key.split(".")[0]
        if not equals or "." not in key or section not in values:
            allowed = ", ".join(f"{name}.…" for name in values)
            hint = did_you_mean(section, values) if equals else ""
            findings.append(f'--set "{item}" is not key=value with a key here ({allowed}).{hint}')
            continue
        try:
            changes.append((key, parse_value(text)))
        except (yaml.YAMLError, ConfigError) as error:
            findings.append(f'--set "{item}": the value is not YAML: {" ".join(str(error).split())}')
    raise_findings(ConfigError, "--set", findings)
    for key, value in changes:
        *parents, last = key.split(".")
        place = values
        for part in parents:
            nested = place.get(part)
            if not isinstance(nested, dict):
                nested = place[part] = {}
            place = nested
        place[last] = value
    return values
