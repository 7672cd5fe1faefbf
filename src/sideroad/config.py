"""What an adapter is, before it has weights: its method, its targets, and how both are checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from sideroad.errors import ConfigError, did_you_mean, raise_findings

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]
InitName = Literal["kaiming", "gaussian", "random", "pissa", "pissa-fast", "olora"]
FROM_WEIGHT = ("pissa", "pissa-fast", "olora")
"""Initialisations that start from the weight; their product is subtracted again."""
FROM_DATA = ("eva", "lora-ga")
"""Initialisations that look at training data."""
SUBTRACTED = (*FROM_WEIGHT, "lora-ga")
"""Initialisations whose product is subtracted, so that the base stays as it is."""
Bias = Literal["none", "adapted", "all"]
AdapterDtype = Literal["float32", "base"]
Slice = bool | tuple[Annotated[int, Field(ge=1)], bool]
"""One part of a fused layer's output: whether it has a pair, or [width, whether]."""


class Settings(BaseModel):
    """A frozen section of a recipe or configuration; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class EvaInit(Settings):
    """A from the principal directions of each layer's input (EVA, Paischer et al. 2024, arXiv:2410.07170); B is 0."""

    kind: Literal["eva"] = "eva"
    """Name of the start; `init: eva` is short for its defaults."""
    batches: Annotated[int, Field(ge=1)] = 8
    """Micro-batches of training data to look at."""
    rho: Annotated[float, Field(ge=1)] = 2.0
    """Largest rank of a layer as a multiple of `rank`; ranks go to the layers whose inputs they explain best, their sum
    staying the same. 1 leaves every layer at `rank`."""


class LoraGaInit(Settings):
    """A and B from the gradient of each weight (LoRA-GA, Wang et al. 2024, arXiv:2407.05000), the base's part
    subtracted."""

    kind: Literal["lora-ga"] = "lora-ga"
    """Name of the start; `init: lora-ga` is short for its defaults."""
    batches: Annotated[int, Field(ge=1)] = 8
    """Micro-batches of training data whose gradient is taken."""
    gamma: Annotated[float, Field(gt=0)] = 16.0
    """Stable scale: the larger, the smaller both factors are."""


def _init_of(value: Any) -> Any:
    """Let a word stand for the settings of an initialisation with all its defaults."""
    return {"kind": value} if value in ("eva", "lora-ga") else value


def _kind_of_init(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "name" if isinstance(value, str) else kind if isinstance(kind, str) else None


Init = Annotated[
    Annotated[InitName, Tag("name")] | Annotated[EvaInit, Tag("eva")] | Annotated[LoraGaInit, Tag("lora-ga")],
    Discriminator(
        _kind_of_init,
        custom_error_type="init",
        custom_error_message="Input should be a name, or settings whose kind is eva or lora-ga",
    ),
    BeforeValidator(_init_of),
]


def init_name(init: InitName | EvaInit | LoraGaInit) -> str:
    """Return the word for an initialisation."""
    return init if isinstance(init, str) else init.kind


class PairSettings(Settings):
    """What all methods that train a pair have in common."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Numerator of the scale s."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of zeroing an element of the branch's input while training; the base's input is never touched."""
    scaling: Scaling = "alpha/r"
    """`alpha/r` (LoRA) or `alpha/sqrt(r)` (rsLoRA, arXiv:2312.03732)."""
    init: Init = "kaiming"
    """The pair at the start. With B zero: `kaiming` (A is U(±1/sqrt(in))), `gaussian` (A has standard deviation 1/r),
    `eva` (from the layer's inputs). With a product that is subtracted again, so that the base stays as it is: `pissa`,
    `pissa-fast`, `olora` (from the weight), `lora-ga` (from its gradient). On embeddings A is zero and B is N(0, 1).
    `random`: both factors, so that a new adapter changes the model; for tests."""


class LoraMethod(PairSettings):
    """Low-rank adaptation, `W' = W + s·B·A` (LoRA, Hu et al. 2021, arXiv:2106.09685, sec. 4.1)."""

    kind: Literal["lora"] = "lora"
    """Name of the method: `lora`, `dora` or `adalora`."""
    trains: Literal["both", "B"] = "both"
    """Which factors are trained. `B` keeps A as it starts and saves what training A would keep of every layer's input
    (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303)."""


class DoraMethod(PairSettings):
    """A pair and a learned magnitude, `W' = m · (W + s·B·A) / ‖W + s·B·A‖` by row (DoRA, Liu et al. 2024,
    arXiv:2402.09353, eq. 5)."""

    kind: Literal["dora"] = "dora"
    """Name of the method."""


class AdaloraMethod(PairSettings):
    """Singular triplets `P·Λ·Q` that compete for a shrinking budget of ranks (AdaLoRA, Zhang et al. 2023,
    arXiv:2303.10512)."""

    kind: Literal["adalora"] = "adalora"
    """Name of the method."""
    rank: Annotated[int, Field(ge=1)] = 12
    """Triplets of a layer at the start."""
    target_rank: Annotated[int, Field(ge=1)] = 8
    """Triplets of a layer at the end, on average."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the run before the budget begins to shrink."""
    final: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the run, at its end, with the final budget."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps from one pruning to the next while the budget shrinks."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """Smoothing of the sensitivity."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """Smoothing of its uncertainty."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the term that keeps P and Q orthogonal."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> AdaloraMethod:
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank {self.target_rank} is above rank {self.rank}; the budget only shrinks")
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup {self.warmup:g} and final {self.final:g} leave no steps for the budget to shrink")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError("init: AdaLoRA starts from random P and Q and Λ = 0; leave init out")
        return self


METHODS = (LoraMethod, DoraMethod, AdaloraMethod)
"""Settings of the methods; a new one joins here and in the union below."""


def _kind_of_method(value: Any) -> str | None:
    """Return the kind that a method names; one without is LoRA."""
    kind = value.get("kind", "lora") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


Method = Annotated[
    Annotated[LoraMethod, Tag("lora")] | Annotated[DoraMethod, Tag("dora")] | Annotated[AdaloraMethod, Tag("adalora")],
    Discriminator(
        _kind_of_method,
        custom_error_type="method",
        custom_error_message="Input should be settings whose kind is lora, dora or adalora",
    ),
]
"""The methods, told apart by `kind`."""


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
