"""What is wrong with the fields of a LoraConfig, whatever model it is for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sideroad.errors import did_you_mean
from sideroad.peft.kinds import TaskType
from sideroad.peft_fields import BIASES


def contradictions(said: Mapping[str, Any]) -> list[str]:
    """List wrong values and fields that contradict each other.

    Args:
        said: all fields by PEFT's names.
    """
    return [*_words(said), *_numbers(said), *_targets(said), *_tokens(said), *_layers(said)]


def _words(said: Mapping[str, Any]) -> Iterator[str]:
    task, bias = said["task_type"], said["bias"]
    if task is not None and task not in list(TaskType):
        guess = did_you_mean(str(task).upper(), list(TaskType))
        yield f"task_type is {task!r}; allowed: {', '.join(TaskType)}, or None.{guess}"
    if said["peft_type"] not in (None, "LORA"):
        yield f"peft_type is {said['peft_type']!r}; a LoraConfig has LORA"
    if bias not in BIASES:
        yield f"bias is {bias!r}; allowed: {', '.join(BIASES)}.{did_you_mean(str(bias), BIASES)}"
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(said[name], str | None):
            yield f"{name} is {said[name]!r}; expected a string or None"
    flags = ("use_rslora", "inference_mode", "fan_in_fan_out", "allow_unmatched", "ensure_weight_tying", "use_dora")
    for name in flags:
        if not isinstance(said[name], bool):
            yield f"{name} is {said[name]!r}; expected True or False"


def _numbers(said: Mapping[str, Any]) -> Iterator[str]:
    if not _whole(said["r"]) or said["r"] < 1:
        yield f"r is {said['r']!r}; the rank is a whole number from 1 on"
    if not _number(said["lora_alpha"]) or said["lora_alpha"] <= 0:
        yield f"lora_alpha is {said['lora_alpha']!r}; expected a finite number above 0"
    dropout = said["lora_dropout"]
    if not _number(dropout) or not 0 <= dropout < 1:
        yield f"lora_dropout is {dropout!r}; it is a probability, from 0 up to but not 1"
    for name, right, what in (
        ("rank_pattern", _whole, "a whole number from 1 on"),
        ("alpha_pattern", _number, "a finite number above 0"),
    ):
        pattern = said[name] or {}
        if not isinstance(pattern, Mapping):
            yield f"{name} is {pattern!r}; expected a mapping of names or regular expressions to numbers"
            continue
        for key, value in pattern.items():
            yield from _broken(key, f"{name}[{key!r}]")
            if not right(value) or value <= 0:
                yield f"{name}[{key!r}] is {value!r}; expected {what}"


def _targets(said: Mapping[str, Any]) -> Iterator[str]:
    for name in ("target_modules", "exclude_modules"):
        value = said[name]
        if isinstance(value, str):
            yield from _broken(value, name)
            if not value.strip():
                yield f'{name} is empty; give names, a regular expression, or "all-linear"'
        elif value is not None and not _strings(value):
            yield f"{name} is {value!r}; expected a list of names, one string (a regular expression), or None"
    wanted = said["target_modules"]
    if wanted is not None and not isinstance(wanted, str) and _strings(wanted):
        if not wanted and not said["target_parameters"]:
            yield 'target_modules is empty, so nothing would be adapted; name modules, or give "all-linear" or None'
        elif any(not name.strip() for name in wanted):
            yield "target_modules has an empty name"
    for name in ("modules_to_save", "target_parameters"):
        value = said[name]
        if value is not None and (isinstance(value, str) or not _strings(value)):
            yield f"{name} is {value!r}; expected a list of names or None"


def _tokens(said: Mapping[str, Any]) -> Iterator[str]:
    value = said["trainable_token_indices"]
    lists = list(value.values()) if isinstance(value, Mapping) else [] if value is None else [value]
    for ids in lists:
        right = isinstance(ids, list | tuple) and all(_whole(one) and one >= 0 for one in ids)
        if not right or len(set(ids)) != len(ids):
            yield (
                f"trainable_token_indices is {value!r}; expected a list of token ids, from 0 on and none twice, or a "
                "mapping of embeddings to such lists"
            )
            return


def _layers(said: Mapping[str, Any]) -> Iterator[str]:
    layers, pattern, wanted = said["layers_to_transform"], said["layers_pattern"], said["target_modules"]
    if layers is not None and not _whole(layers):
        if not isinstance(layers, list | tuple) or not all(_whole(one) for one in layers):
            yield f"layers_to_transform is {layers!r}; expected a block's number, a list of them, or None"
        elif any(one < 0 for one in layers):
            yield f"layers_to_transform is {layers!r}; blocks are counted from 0"
    if pattern is not None and not isinstance(pattern, str) and not _strings(pattern):
        yield f"layers_pattern is {pattern!r}; expected a name, a list of names, or None"
    if pattern and layers is None:
        yield f"layers_pattern is {pattern!r} without layers_to_transform, which says which of these layers"
    for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if isinstance(wanted, str) and value is not None:
            yield (
                f"{name} is set, but target_modules is the string {wanted!r}: a regular expression says the layers "
                "itself. Name the modules in a list, or write the numbers into the expression"
            )


def _broken(expression: object, name: str) -> Iterator[str]:
    try:
        re.compile(str(expression))
    except re.error as error:
        yield f"{name} is {expression!r}, which is not a regular expression: {error}"


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, str) for one in value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
