"""What a run shows to people: the loss as a picture, answers side by side, and the adapter's model card.

The makers are pure functions from values to bytes or text; the caller writes them (`run_directory.write_atomically`,
`files.replace_file`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sideroad.train.evaluation import Comparison, Sample

SMOOTHING_STEPS = 20
"""Steps over which the plotted training loss is averaged, at most; a tenth of a shorter run."""

_PERCENT = ("exact_match", "json_valid", "json_field:", "rouge_l")
_CELL = 1500


@dataclass(frozen=True)
class DataFile:
    """One file of the data: its name, what it was used for (`training`, `validation`), and the SHA-256 of its bytes."""

    name: str
    role: str
    sha256: str


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        base_name: what the base is called.
        base_reference: what `base_model` in the front matter says: a hub id, else the base's name.
        recipe: the resolved recipe as YAML.
        parameters: values in the file; `adapted_layers` how many layers carry them.
        kept: which weights these are, in words, such as `last step (330)`.
        version: sideroad's.
        trained: values that were trained, fewer or more than those in the file where a start, a factor that is kept, or
            pruned triplets are among either; None where they are the same.
    """

    name: str
    base_name: str
    base_reference: str
    base_source: str
    base_sha256: str
    base_licence: str | None
    data: tuple[DataFile, ...]
    recipe: str
    parameters: int
    adapted_layers: int
    kept: str
    scores: Comparison | None
    version: str
    trained: int | None = None


def loss_plot(records: Sequence[Mapping[str, Any]], title: str = "") -> bytes:
    """Draw training loss (each step and smoothed), validation loss and learning rate; returns a PNG.

    Args:
        records: the objects of metrics.jsonl; lines without a finite number are passed over.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, losses = _series(records, "loss")
    at, validation = _series(records, "validation_loss")
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#4477aa", alpha=0.3, linewidth=1, label="training loss, each step")
    axes.plot(steps, smooth(losses), color="#4477aa", linewidth=2, label="training loss, smoothed")
    if at:
        axes.plot(at, validation, "o-", color="#cc3311", linewidth=1.5, markersize=5, label="validation loss")
        axes.annotate(f"{validation[-1]:.3f}", (at[-1], validation[-1]), xytext=(0, 8), textcoords="offset points",
                      ha="center", color="#cc3311", fontsize=9)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=title, ylim=_limits(losses, validation))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    rate_steps, rates = _series(records, "lr")
    if rates:
        right = axes.twinx()
        right.plot(rate_steps, rates, color="#999999", linewidth=1, linestyle=":", label="learning rate")
        right.set(ylabel="learning rate", ylim=(0, max(rates) * 1.05 or 1))
        right.yaxis.label.set_color("#777777")
        right.tick_params(axis="y", colors="#777777")
        right.spines["top"].set_visible(False)
        axes.plot([], [], color="#999999", linewidth=1, linestyle=":", label="learning rate")
    axes.legend(frameon=False, loc="upper right")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": "sideroad"})
    return content.getvalue()


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average, narrower at the ends; as long as the input."""
    half = min(SMOOTHING_STEPS, max(1, len(values) // 10)) // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def samples_page(scores: Comparison, title: str = "Samples") -> str:
    """Return Markdown: the scores, then each sample's prompt, reference and both answers, side by side."""
    blocks = [f"# {title}", scores_table(scores)]
    pairs = zip(scores.base.samples, scores.adapted.samples, strict=True)
    blocks += [_sample(number, base, adapted) for number, (base, adapted) in enumerate(pairs, 1)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def scores_table(scores: Comparison) -> str:
    """Return a Markdown table of base against adapted: shares as percentages, everything else as a number."""
    base, adapted = scores.base.values, scores.adapted.values
    names = list(dict.fromkeys([*base, *adapted]))
    rows = [f"| {label(name)} | {shown(name, base.get(name))} | {shown(name, adapted.get(name))} |" for name in names]
    notes = [f"{label(name)}: `{text}`" for name, text in scores.adapted.signatures.items()]
    table = "\n".join(["| on the validation set | base | adapted |", "|---|---:|---:|", *rows])
    return "\n\n".join([table, *notes])


def label(name: str) -> str:
    """Return a metric's name for people, such as `intent right` for `json_field:intent`."""
    known = {
        "loss": "loss (nats per token)",
        "exact_match": "exact match",
        "json_valid": "JSON parses",
        "bleu": "BLEU",
        "chrf": "chrF2",
        "rouge_l": "ROUGE-L",
    }
    return known.get(name, f"{name.removeprefix('json_field:')} right" if name.startswith("json_field:") else name)


def shown(name: str, value: float | None) -> str:
    """Return a metric's value as people read it: a percentage for shares, else a number; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if name.startswith(_PERCENT):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if name == "loss" else f"{value:.1f}"


def model_card(facts: CardFacts) -> str:
    """Return the README.md of an adapter directory: front matter that the hub reads, then what a person needs."""
    front = {
        "base_model": facts.base_reference,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"license": facts.base_licence.lower()} if facts.base_licence else {}),
        "tags": ["lora", "sideroad", *([f"base_model:adapter:{facts.base_reference}"] if _on_hub(facts) else [])],
    }
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()
    trained = facts.parameters if facts.trained is None else facts.trained
    stored = "" if trained == facts.parameters else f", stored as {facts.parameters:,} values"
    parts = [
        f"---\n{head}\n---",
        f"# {facts.name}",
        f"A LoRA adapter for {facts.base_name}: {trained:,} trained parameters on {facts.adapted_layers} "
        f"layers{stored}, made with sideroad {facts.version}. The weights are those of the {facts.kept}.",
        _base(facts),
        _data(facts.data),
        "" if facts.scores is None else "## Scores\n\n" + scores_table(facts.scores),
        _use(facts),
        f"## Recipe\n\n```yaml\n{facts.recipe.strip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(facts: CardFacts) -> str:
    return (
        "## Base\n\n| | |\n|---|---|\n"
        f"| name | {facts.base_name} |\n| source | {facts.base_source} |\n| SHA-256 | `{facts.base_sha256}` |\n"
        f"| licence | {facts.base_licence or 'not stated by its files'} |\n\n"
        "The adapter fits these weights and no others; its licence must respect the base's and the data's."
    )


def _data(files: Sequence[DataFile]) -> str:
    rows = [f"| {_cell(item.name)} | {item.role} | `{item.sha256}` |" for item in files]
    return "\n".join(["## Data", "", "| file | used for | SHA-256 |", "|---|---|---|", *rows])


def _on_hub(facts: CardFacts) -> bool:
    return "/" in facts.base_reference


def _use(facts: CardFacts) -> str:
    known = _on_hub(facts)
    base = facts.base_reference if known else "PATH_TO_THE_BASE"
    where = "" if known else (
        "\n\nPATH_TO_THE_BASE is a directory with the base's weights in Hugging Face format; "
        "`sideroad models --json` says where sideroad keeps its own copies."
    )
    return f"""## Use

With sideroad:

```bash
sideroad chat PATH_TO_THIS_DIRECTORY
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH_TO_THIS_DIRECTORY")
```

With vLLM:

```bash
vllm serve {base} --enable-lora --lora-modules adapter=PATH_TO_THIS_DIRECTORY
```{where}"""


def _sample(number: int, base: Sample, adapted: Sample) -> str:
    rows = [("prompt", base.prompt), ("reference", base.reference), ("base", base.output), ("adapted", adapted.output)]
    cells = "\n".join(f"| **{name}** | {_cell(text)} |" for name, text in rows)
    return f"## {number}. {_cell(base.source)}\n\n| | |\n|---|---|\n{cells}"


def _cell(text: str) -> str:
    """Text as it is inside one Markdown table cell: nothing in it is markup, and line ends stay visible."""
    if len(text) > _CELL:
        text = f"{text[:_CELL]} … ({len(text) - _CELL} more characters)"
    for character in "\\`*_[]|~#$":
        text = text.replace(character, f"\\{character}")
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<br>".join(plain.splitlines()) or "*(nothing)*"


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    kept = [(float(step), float(value)) for step, value in found if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _limits(losses: Sequence[float], validation: Sequence[float]) -> tuple[float, float | None]:
    """Start at zero; leave out the spikes that would squeeze the rest, unless they are most of it."""
    ordered = sorted(losses)
    usual = ordered[int(0.98 * (len(ordered) - 1))] if ordered else 0.0
    top = max([usual, *smooth(losses), *validation], default=0.0)
    return 0.0, top * 1.1 if top > 0 else None
