"""`sideroad preview`: what a recipe would train on, token by token, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from rich.console import Console

    from sideroad.data.dataset import Loaded, Statistics
    from sideroad.data.findings import Finding
    from sideroad.data.preview import PreviewSample
    from sideroad.train.recipe import Recipe

SUMMARY = "Show what a recipe would train on, token by token."
EXAMPLES = ("sideroad preview examples/quickstart.yaml -n 3", "sideroad preview recipe.yaml --set data.max_length=256")
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}

Samples = Annotated[int, typer.Option("-n", "--samples", min=0, help="Samples to show.")]
Seed = Annotated[int, typer.Option("--seed", help="Chooses the samples.")]


def run(
    recipe: frame.Recipe,
    samples: Samples = 5,
    seed: Seed = 0,
    set_: frame.Set = None,
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """Show decoded samples with the trained tokens marked, length and mask statistics, and every finding.

    Trained tokens are green, or stand in brackets where there is no colour. Exits with 3 if training would be refused.
    """
    from sideroad.base import load_meta, load_tokenizer
    from sideroad.cli import render
    from sideroad.cli.progress import Bar, loading
    from sideroad.data.dataset import load_data
    from sideroad.data.preview import preview
    from sideroad.errors import DataError
    from sideroad.train.recipe import load_recipe

    settings = load_recipe(recipe, set_ or ())
    with Bar(render.console(to_stderr=True)) as bar:
        tokenizer = load_tokenizer(settings.base, offline=offline, on_progress=loading(bar))
    model = load_meta(settings.base, offline=offline)
    positions = getattr(model.config, "max_position_embeddings", None)
    data = load_data(settings.data, tokenizer, offline=offline, max_positions=positions)
    shown = preview(data.train, tokenizer, samples, seed)
    saved = _saved(settings, data, model)
    if as_json:
        render.write_json(_plain(data, shown) | {"saved_tokens": saved})
    else:
        _print(render.console(), data, shown, saved)
    if any(finding.severity == "error" for finding in data.findings):
        raise typer.Exit(DataError.exit_code)


def _plain(data: Loaded, samples: list[PreviewSample]) -> dict[str, Any]:
    return {
        "samples": [
            {
                "source": sample.source,
                "tokens": sample.tokens,
                "trained_tokens": sample.trained_tokens,
                "runs": [{"text": text, "trained": trained} for text, trained in sample.runs],
            }
            for sample in samples
        ],
        "train": data.train.statistics.to_json(),
        "validation": data.validation.statistics.to_json() if data.validation else None,
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "message": finding.message,
                "examples": finding.examples,
                "count": finding.count,
            }
            for finding in data.findings
        ],
    }


def _saved(recipe: Recipe, data: Loaded, model: Any) -> int:
    """Tokens that shared beginnings save in the first epoch, if the model keeps packed sequences apart.

    Args:
        model: on the meta device; its windows and dropouts decide too.
    """
    from sideroad.data.sharing import saved_tokens
    from sideroad.kernels.packed_attention import window
    from sideroad.train.choosing import drops
    from sideroad.train.order import Order
    from sideroad.train.seeds import derive
    from sideroad.train.settings import TrainConfig

    config = recipe.data
    shares = config.share_prefixes == "auto" and config.packing != "off" and recipe.train.fast
    dropping = recipe.adapter.method.dropout or any(drops(module) for module in model.modules())
    if not shares or dropping or not data.train.examples:
        return 0
    reach = window(model) or recipe.data.max_length
    ids = [example.ids for example in data.train.examples]
    seed = derive(recipe.seed, "data")
    order = Order(data.train.lengths, recipe.optim, seed=seed, packed=True, ids=ids)
    steps = order.steps(TrainConfig(epochs=1))
    batches = ([ids[index] for index in batch] for step in steps for batch in step)
    return sum(saved_tokens(rows) for rows in batches if max(map(len, rows)) <= reach)


def _print(console: Console, data: Loaded, samples: list[PreviewSample], saved: int) -> None:
    from sideroad.cli import render

    for sample in samples:
        _print_sample(console, sample)
    columns = [("train", data.train.statistics)]
    if data.validation:
        columns.append(("validation", data.validation.statistics))
    _print_statistics(console, columns)
    if saved:
        console.print(
            f"\n{saved:,} tokens of an epoch ({render.share(saved, data.train.statistics.tokens)}) are beginnings that "
            "rows of a batch repeat; they are computed once if the model keeps packed rows apart",
            soft_wrap=True,
        )
    console.print()
    _print_findings(console, data.findings)


def _print_sample(console: Console, sample: PreviewSample) -> None:
    from rich.text import Text

    from sideroad.cli import render

    coloured = console.color_system is not None and not console.no_color
    begin, end = ("⟦", "⟧") if console.encoding.startswith("utf") else ("[[", "]]")
    text = Text()
    for run_text, trained in sample.runs:
        piece = render.visible(run_text)
        if not trained:
            text.append(piece, style="dim" if coloured else "")
        elif coloured:
            text.append(piece, style="bold green")
        else:
            text.append(f"{begin}{piece}{end}")
    console.rule(f"{sample.source}   {sample.trained_tokens} of {sample.tokens} tokens trained", align="left")
    console.print(text, soft_wrap=True)
    console.print()


def _print_statistics(console: Console, columns: list[tuple[str, Statistics]]) -> None:
    from sideroad.cli import render

    rows: dict[str, list[str]] = {}
    for _, counts in columns:
        lengths = (counts.length_min, counts.length_median, counts.length_p95, counts.length_max)
        cells = {
            "rows": f"{counts.rows:,}",
            "sequences": f"{counts.sequences:,}",
            "tokens": f"{counts.tokens:,}",
            "trained tokens": f"{counts.trained_tokens:,} ({100 * counts.trained_fraction:.1f} %)",
            "length min / median / p95 / max": " / ".join(map(str, lengths)),
            "left out": _reasons(counts.left_out),
            "truncated": _reasons(counts.truncated),
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    names = ("", *(name for name, _ in columns))
    console.print(render.table(names, [(name, *cells) for name, cells in rows.items()]))


def _reasons(counts: Any) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items()) or "0"


def _print_findings(console: Console, findings: tuple[Finding, ...]) -> None:
    from rich.text import Text

    for severity, style in STYLES.items():
        for finding in findings:
            if finding.severity == severity:
                console.print(Text(f"{severity}: ", style=style) + Text(str(finding)), soft_wrap=True)
