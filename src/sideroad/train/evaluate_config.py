"""The `evaluate` section of a recipe; importing it loads neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from sideroad.config import Settings
from sideroad.errors import did_you_mean

METRICS = ("exact_match", "json_valid", "bleu", "chrf", "rouge_l")
"""Task metrics that take no argument."""

FIELD_METRIC = "json_field:"
"""What a metric on one field of a JSON answer begins with; the field's name follows."""


class EvaluateConfig(Settings):
    """What is scored on the validation set besides its loss, and how answers are generated for it."""

    metrics: tuple[str, ...] = ()
    """Any of `exact_match`, `json_valid`, `json_field:NAME`, `bleu`, `chrf`, `rouge_l`; the loss is always there."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 96
    """Longest generated answer."""
    samples: Annotated[int, Field(ge=0)] = 5
    """Answers to show side by side in samples.md."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Answers to generate and score, spread evenly over the set; null: all. The loss covers every example."""
    batch_size: Annotated[int, Field(ge=1)] = 28
    """Answers generated at a time."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the generated answers; 0 takes the likeliest token."""

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems = [problem for name in value if (problem := _objection(name))]
        problems += [f'"{name}" is given twice' for name in sorted({n for n in value if value.count(n) > 1})]
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(name for name in value if name != "loss")


def _objection(name: str) -> str | None:
    if name in METRICS or name == "loss":
        return None
    if name.startswith(FIELD_METRIC):
        return None if name[len(FIELD_METRIC) :].strip() else f'"{name}" names no field; write {FIELD_METRIC}intent'
    hint = did_you_mean(name, [*METRICS, "loss", "json_field"])
    return f'unknown metric "{name}".{hint} Allowed: loss, {", ".join(METRICS)}, {FIELD_METRIC}NAME'
