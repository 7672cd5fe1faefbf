"""`sideroad evaluate`: a base against the same base with an adapter, on the same rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from sideroad.adapter import Adapter
    from sideroad.data.config import DataConfig
    from sideroad.train.evaluate_config import EvaluateConfig

SUMMARY = "Score a base against the same base with an adapter."
EXAMPLES = (
    "sideroad evaluate runs/quickstart",
    "sideroad evaluate runs/quickstart --data more.jsonl --metrics exact_match,json_valid --limit 100 --json",
)

Place = Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run or adapter directory.")]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="Rows to score [the validation set of the adapter's recipe]."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metrics", help="Metrics beside the loss, separated by commas [those of the recipe]."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Generate and score at most this many answers.")]
Samples = Annotated[int | None, typer.Option("--samples", min=0, help="Answers to show side by side.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key below data or evaluate; repeatable."),
]


def run(
    place: Place,
    data: Data = None,
    base: frame.BaseModel = None,
    metrics: Metrics = None,
    limit: Limit = None,
    samples: Samples = None,
    set_: Set = None,
    device: frame.Device = "auto",
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """Score base and adapter on a data set: loss, task metrics, and samples side by side."""
    from sideroad.cli import render, scores
    from sideroad.cli.locate import adapter_dir
    from sideroad.cli.progress import Bar, evaluating

    directory = adapter_dir(place)
    from sideroad.adapter import Adapter
    from sideroad.cli.session import open_session, prompt_of
    from sideroad.data.dataset import load_data
    from sideroad.data.findings import refuse
    from sideroad.train.evaluation import Comparison, evaluate

    given = {"metrics": _names(metrics), "limit": limit, "samples": samples}
    adapter = Adapter.load(directory)
    rows, settings = _settings(adapter, directory, data, given, set_ or [])
    with Bar(render.console(to_stderr=True)) as bar:
        session = open_session({"adapter": directory}, base, device=device, offline=offline, bar=bar)
        template = prompt_of(adapter.manifest).get("chat_template")
        session.base.tokenizer.chat_template = template or session.base.tokenizer.chat_template
        longest = getattr(session.base.model.config, "max_position_embeddings", None)
        loaded = load_data(rows, session.base.tokenizer, offline=offline, max_positions=longest)
        refuse(loaded.findings)
        found = {}
        for who in ("base", "adapted"):
            with session.acting("adapter" if who == "adapted" else None):
                show = partial(evaluating, bar, who, len(loaded.train.examples))
                show(0, 0)
                found[who] = evaluate(session.base, loaded.train, settings, rows, on_answers=show)
    comparison = Comparison(found["base"], found["adapted"])
    if as_json:
        render.write_json(
            {
                "adapter": str(directory),
                "base_model": session.base.identity.to_json(),
                "data": {"source": rows.train, "sha256": loaded.train.sha256, "examples": len(loaded.train.examples)},
                **scores.plain(comparison),
            }
        )
    else:
        scores.print_comparison(render.console(), comparison)


def _names(metrics: list[str] | None) -> list[str] | None:
    return None if metrics is None else [name for item in metrics for name in item.split(",") if name]


def _settings(
    adapter: Adapter, directory: Path, data: str | None, given: dict[str, Any], overrides: list[str]
) -> tuple[DataConfig, EvaluateConfig]:
    """What to score and how: the adapter's recipe, changed by the options; `data.train` is what gets scored."""
    from sideroad.cli.session import prompt_of, recipe_values
    from sideroad.cli.settings import Scored, change
    from sideroad.config import validate
    from sideroad.errors import ConfigError

    written = recipe_values(directory, adapter)
    section = dict(written.get("data") or {})
    source = section.get("validation") if data is None else data
    if source is None or (data is None and "/" not in source and not Path(source).exists()):
        found = f"its validation set {source} is not here" if source else "it names no validation set"
        raise ConfigError(f"{directory}: {found}; say what to score with --data FILE.")
    prompt = prompt_of(adapter.manifest)
    if "system" in prompt:
        section["system"] = prompt["system"]
    if "chat_template" in prompt:
        section["chat_template"] = None
    limit = section.get("validation_limit") if data is None else None
    section |= {"train": source, "validation": None, "limit": limit, "validation_limit": None}
    if data is not None:
        section |= {"format": "auto"} if not section.get("columns") else {}
    values = {"data": section, "evaluate": dict(written.get("evaluate") or {})}
    options = [(f"evaluate.{key}", value) for key, value in given.items() if value is not None]
    chosen = validate(Scored, change(values, options, overrides), "the adapter's recipe and the command line")
    return chosen.data, chosen.evaluate
