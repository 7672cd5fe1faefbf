"""What a method is, before it has weights: where its pair starts, its numbers, and how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from sideroad.errors import did_you_mean

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]
InitName = Literal["kaiming", "gaussian", "random", "pissa", "pissa-fast", "olora"]
FROM_WEIGHT = ("pissa", "pissa-fast", "olora")
"""Initialisations that start from the weight; their product is subtracted again."""
FROM_DATA = ("eva", "lora-ga")
"""Initialisations that look at training data."""
SUBTRACTED = (*FROM_WEIGHT, "lora-ga")
"""Initialisations whose product is subtracted, so that the base stays as it is."""


class Settings(BaseModel):
    """A frozen section of a recipe or configuration; a key that it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


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
    if isinstance(value, str) and value not in (*get_args(InitName), *FROM_DATA):
        allowed = (*get_args(InitName), *FROM_DATA)
        guess = did_you_mean(value.lower().replace("_", "-"), allowed)
        raise ValueError(f"there is no such start; allowed: {', '.join(allowed)}.{guess}")
    return {"kind": value} if value in FROM_DATA else value


def _kind_of(value: Any) -> str | None:
    """Return the kind that settings name; a method without one is LoRA, and a word for a start is a `name`."""
    if isinstance(value, str):
        return "name"
    kind = value.get("kind", "lora") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


Init = Annotated[
    Annotated[InitName, Tag("name")] | Annotated[EvaInit, Tag("eva")] | Annotated[LoraGaInit, Tag("lora-ga")],
    Discriminator(
        _kind_of,
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


    @property
    def variant(self) -> str:
        """Which delta it is: its kind, or a form of it that has a delta of its own."""
        return str(getattr(self, "kind", ""))


class LoraMethod(PairSettings):
    """Low-rank adaptation, `W' = W + s·B·A` (LoRA, Hu et al. 2021, arXiv:2106.09685, sec. 4.1)."""

    kind: Literal["lora"] = "lora"
    """Name of the method: `lora`, `dora` or `adalora`."""
    trains: Literal["both", "B"] = "both"
    """Which factors are trained. `B` keeps A as it starts and saves what training A would keep of every layer's input
    (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303)."""


    @property
    def variant(self) -> str:
        """`lora-fa` where A is not trained."""
        return "lora-fa" if self.trains == "B" else "lora"


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
        wrong = []
        if self.target_rank > self.rank:
            wrong.append(f"target_rank {self.target_rank} is above rank {self.rank}; the budget only shrinks")
        if self.warmup + self.final >= 1:
            wrong.append(f"warmup {self.warmup:g} and final {self.final:g} leave no steps for the budget to shrink")
        if self.init != "kaiming":
            wrong.append("init: AdaLoRA has a start of its own, random P and Q and Λ = 0; leave init out")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


METHODS = (LoraMethod, DoraMethod, AdaloraMethod)
"""Settings of the methods; a new one joins here and in the union below."""


ELSEWHERE: Mapping[str, str] = {
    **{f"{name}": f"it is a start: init: {name}" for name in (*FROM_DATA, *FROM_WEIGHT)},
    "rslora": "it is a scaling: scaling: alpha/sqrt(r)", "lora+": "it is a ratio of learning rates: optim.lr_ratio_b",
    "lora-plus": "it is a ratio of learning rates: optim.lr_ratio_b", "lora-fa": "it is plain LoRA with trains: B",
}  # fmt: skip
"""Methods by name that are no kinds of their own → what they are."""


def _known_kind(value: Any) -> Any:
    """Refuse kinds that do not exist, and keys that another kind has, in words that lead on."""
    if not isinstance(value, Mapping):
        return value
    kind, kinds = value.get("kind", "lora"), [one.model_fields["kind"].default for one in METHODS]
    if kind not in kinds:
        word = str(kind).lower().replace("_", "-")
        where = f" {word}: {ELSEWHERE[word]}." if word in ELSEWHERE else did_you_mean(word, kinds)
        raise ValueError(f"there is no kind {kind!r}; allowed: {', '.join(kinds)}.{where}")
    if kind != "lora" and "trains" in value:
        raise ValueError(f"trains says which factors of plain LoRA learn; {kind} trains all it has. Leave it out")
    return value


Method = Annotated[
    Annotated[LoraMethod, Tag("lora")] | Annotated[DoraMethod, Tag("dora")] | Annotated[AdaloraMethod, Tag("adalora")],
    Discriminator(
        _kind_of,
        custom_error_type="method",
        custom_error_message="Input should be settings with a kind",
    ),
    BeforeValidator(_known_kind),
]
"""The methods, told apart by `kind`."""
