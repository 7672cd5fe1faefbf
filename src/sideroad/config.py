"""What an adapter is, before it has weights: its method, its targets, and how both are checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from sideroad.errors import ConfigError, did_you_mean, raise_findings
from sideroad.method_config import (
    FROM_DATA,
    FROM_WEIGHT,
    SUBTRACTED,
    AdaloraMethod,
    DoraMethod,
    EvaInit,
    Init,
    InitName,
    LoraGaInit,
    LoraMethod,
    Method,
    PairSettings,
    Scaling,
    Settings,
    init_name,
)

__all__ = [
    "FROM_DATA",
    "FROM_WEIGHT",
    "SUBTRACTED",
    "AdaloraMethod",
    "AdapterConfig",
    "AdapterDtype",
    "Bias",
    "DoraMethod",
    "EvaInit",
    "Init",
    "InitName",
    "LoraGaInit",
    "LoraMethod",
    "Method",
    "PairSettings",
    "Scaling",
    "Settings",
    "Slice",
    "init_name",
    "settings_in",
    "validate",
]

Bias = Literal["none", "adapted", "all"]
AdapterDtype = Literal["float32", "base"]
Slice = bool | tuple[Annotated[int, Field(ge=1)], bool]
"""One part of a fused layer's output: whether it has a pair, or [width, whether]."""


class AdapterConfig(Settings):
    """Which layers are adapted, and how.

    Targets, exclusions and pattern keys share one language: a name (`q_proj`, `self_attn.q_proj`: a whole dotted
    suffix), a glob over the whole path (`*.layers.1?.mlp.*`), or `re:` and a regular expression for the whole path.
    """

    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head and experts' routers, and the weights of fused experts), or
    one or more patterns, which may also name embeddings, convolutions, attention and weights of experts
    (`gate_up_proj`); none at all where only `modules_to_save` or `trainable_tokens` are trained."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers to leave alone."""
    layers: str | tuple[int, ...] | None = None
    """Blocks to adapt, counted from 0: a list, or ranges such as `0-3,10-`."""
    layers_pattern: str | None = None
    """Name of the block list in module paths (`layers`, `h`); by default any number in the path's first list."""
    method: Method = LoraMethod()
    """The method and its numbers."""
    rank_pattern: Mapping[str, Annotated[int, Field(ge=1)]] = {}
    """Pattern → rank where it differs from the method's; the first match counts."""
    alpha_pattern: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """Pattern → alpha where it differs from the method's; the first match counts."""
    slices: Mapping[str, tuple[Slice, ...]] = {}
    """Pattern of fused linear layers → which parts of their output have a pair of their own, of `rank` each: `[true,
    false, true]` for q and v of a fused qkv, `[[64, true], [16, false], [16, true]]` where widths differ."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules of which a copy is trained whole, such as a new classifier."""
    trainable_tokens: Mapping[str, tuple[Annotated[int, Field(ge=0)], ...]] = {}
    """Pattern of an embedding (or an output head that is not tied to one) → token ids whose rows are trained."""
    tie_embeddings: bool = False
    """Let an output head that is tied to a trained embedding follow its pair or whole copy (PEFT's
    `ensure_weight_tying`; token rows always do). Otherwise the two part: only the one that is named is trained."""
    allow_unmatched: bool = False
    """Pass over patterns that match nothing instead of refusing them."""
    bias: Bias = "none"
    """Bias vectors to train beside the pairs: none, those of adapted layers, or all of the model's."""
    dtype: AdapterDtype = "float32"
    """Storage type of the adapter's weights; products run in the base's type."""

    @field_validator("targets", "exclude", "modules_to_save")
    @classmethod
    def _reject_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for pattern in (value,) if isinstance(value, str) else value:
            if not pattern.strip():
                raise ValueError("a pattern is empty; give a name, a glob or re:…")
        return value

    @field_validator("slices")
    @classmethod
    def _require_slices(cls, value: Mapping[str, tuple[Slice, ...]]) -> Mapping[str, tuple[Slice, ...]]:
        for pattern, parts in value.items():
            if len({isinstance(part, bool) for part in parts}) != 1:
                raise ValueError(f"{pattern}: give true/false for equal parts, or [width, true/false] for every part")
            if not any(part if isinstance(part, bool) else part[1] for part in parts):
                raise ValueError(f"{pattern}: no part has a pair; set at least one to true")
        return value

    @field_validator("trainable_tokens")
    @classmethod
    def _require_tokens(cls, value: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        for pattern, ids in value.items():
            if not ids or len(set(ids)) != len(ids):
                raise ValueError(f"{pattern}: give at least one token id, and none twice")
        return value

    @model_validator(mode="after")
    def _refuse_combinations(self) -> AdapterConfig:
        named = init_name(self.method.init)
        if self.tie_embeddings and (self.method.kind != "lora" or named in SUBTRACTED):
            what = f"method.kind: {self.method.kind}" if self.method.kind != "lora" else f"method.init: {named}"
            raise ValueError(f"tie_embeddings lets a head follow an embedding's plain pair; {what} has more than that")
        return self

    @model_validator(mode="after")
    def _require_target(self) -> AdapterConfig:
        if not (self.targets or self.modules_to_save or self.trainable_tokens):
            raise ValueError('no target given; use "all-linear" or name layers')
        return self


S = TypeVar("S", bound=Settings)


def validate(schema: type[S], values: object, where: str) -> S:
    """Check plain values against a section's schema.

    Args:
        values: mapping as read from YAML or JSON.
        where: file or source named in the messages.
    Raises:
        ConfigError: every unknown key (with the nearest known one) and every wrong value, at once.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        findings = [_finding(schema, item, where) for item in error.errors()]
        raise_findings(ConfigError, where, findings)
        raise AssertionError("unreachable") from error


def _finding(schema: type[Settings], item: Any, where: str) -> str:
    parts, section = _trail(schema, item["loc"])
    path = ".".join(parts)
    if item["type"] != "extra_forbidden":
        shown = repr(item["input"])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{path or 'top level'}: {item['msg'].removeprefix('Value error, ')}; found {shown} ({where})"
    allowed = sorted(section.model_fields)
    return (
        f'unknown key "{path}".{did_you_mean(parts[-1], allowed)} '
        f"Allowed here: {', '.join(allowed)} ({where})"
    )


def _trail(schema: type[Settings], location: Iterable[Any]) -> tuple[list[str], type[Settings]]:
    """Return the keys that lead to a finding, without the tags of unions between them, and the section it is in."""
    parts: list[str] = []
    members: list[type[Settings]] = []
    for part in map(str, location):
        tagged = next((one for one in members if one.model_fields["kind"].default == part), None)
        if tagged is not None or (members and part == "name"):
            schema = tagged or schema
            members = []
            continue
        parts.append(part)
        field = schema.model_fields.get(part)
        found = list(settings_in(field.annotation)) if field else []
        schema = found[0] if found else schema
        members = [one for one in found if "kind" in one.model_fields]
    return parts, schema


def settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """Yield the sections that a type annotation names, those of unions one by one."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in get_args(annotation):
        yield from settings_in(argument)
