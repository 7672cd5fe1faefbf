"""`sideroad train`: a recipe in, a run directory out, with everything worth knowing on the way."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from rich.console import Console

    from sideroad.cli.watch import Watch
    from sideroad.train.events import Result
    from sideroad.train.recipe import Recipe
    from sideroad.train.speed import Speed

SUMMARY = "Train an adapter as a recipe says."
EXAMPLES = (
    "sideroad train examples/quickstart.yaml",
    "sideroad train examples/quickstart.yaml --set optim.lr=1e-3 --set train.epochs=2",
    "sideroad train examples/quickstart.yaml --run runs/quickstart --resume",
)
RUNS = Path("runs")
LEFT_BEHIND = {
    "adapter": "PEFT files and a model card",
    "samples.md": "answers of base and adapted model side by side",
    "loss.png": "the loss, drawn",
    "metrics.jsonl": "one line per step and validation",
    "checkpoints": "what --resume goes on from",
    "recipe.yaml": "the recipe with every default",
    "env.json": "machine and versions",
}

Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Directory for everything the run leaves behind [default: runs/RECIPE, or RECIPE-2, RECIPE-3, … "
        "if that is taken; with --resume, the newest of these].",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")]


def run(
    recipe: frame.Recipe,
    run: Run = None,
    set_: frame.Set = None,
    resume: Resume = False,
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """Train an adapter as a recipe says, then compare it with its base.

    Ctrl-C, or even kill -9, leaves a run that --resume continues exactly.
    """
    from sideroad.cli import render
    from sideroad.cli.progress import Bar
    from sideroad.cli.watch import Watch
    from sideroad.train.recipe import load_recipe

    settings = load_recipe(recipe, set_ or ())
    place = run or run_directory(recipe, resume=resume)
    console = render.console(to_stderr=as_json)
    _announce(console, settings, place, resume=resume)
    with Bar(console) as bar:
        bar.show("preparing base and data", 0, None, "")
        result = _train(settings, recipe, place, Watch(bar), resume=resume, offline=offline)
    if as_json:
        render.write_json(asdict(result))
    else:
        _report(console, result, _dealt(settings, result))


def run_directory(recipe: Path, *, resume: bool) -> Path:
    """Where a run of `recipe` goes by default.

    That is the first free one of runs/NAME, runs/NAME-2, runs/NAME-3 and so on, where NAME is the recipe's file name;
    with `resume` the last one taken. A recipe.yaml inside a run directory resumes that run.
    """
    if resume and recipe.name == "recipe.yaml" and (recipe.parent / "env.json").is_file():
        return recipe.parent
    place, number = RUNS / recipe.stem, 1
    following = place
    while following.exists():
        place, number = following, number + 1
        following = RUNS / f"{recipe.stem}-{number}"
    return place if resume else following


def _announce(console: Console, recipe: Recipe, place: Path, *, resume: bool) -> None:
    from sideroad.cli.described import method_line

    adapter = recipe.adapter
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    console.print(f"base        {recipe.base.model}", soft_wrap=True)
    console.print(f"method      {method_line(adapter.method)}, on {targets}", soft_wrap=True)
    console.print(f"run         {place}{' (resumed)' if resume else ''}", soft_wrap=True)


def _train(recipe: Recipe, file: Path, place: Path, watch: Watch, *, resume: bool, offline: bool) -> Result:
    from sideroad.train.interrupts import Interrupted
    from sideroad.train.run import train

    try:
        return train(recipe, place, resume=resume, offline=offline, on_event=watch)
    except Interrupted as interrupt:
        watch.bar.close()
        again = shlex.join(["sideroad", "train", str(file), "--run", str(place), "--resume"])
        raise KeyboardInterrupt(
            f"interrupted after step {interrupt.step}; nothing is lost. Go on with:\n  {again}"
        ) from interrupt


def _speed(speed: Speed) -> str:
    """Rates, how near the run came to the machine's limit, and what sharing saved."""
    text = (
        f"{speed.trained_tokens_per_second:,.0f} trained tokens/s, {speed.real_tokens_per_second:,.0f} real tokens/s"
    )
    if speed.limit_share is not None:
        text += f"; {speed.limit_share:.0%} of the speed of this machine's matrix products"
    if speed.saved_tokens:
        text += f"\n{speed.saved_tokens:,} tokens of repeated beginnings were computed once"
    return text


def _dealt(recipe: Recipe, result: Result) -> str | None:
    """What ranks the layers have in the end, where the run dealt them."""
    from sideroad.adapter import Adapter
    from sideroad.analyze.inspect import ranks_of
    from sideroad.cli.described import ranks_line
    from sideroad.config import init_name

    method = recipe.adapter.method
    if method.kind != "adalora" and init_name(method.init) != "eva":
        return None
    ranks = ranks_of(Adapter.load(result.adapter))
    return None if ranks is None else ranks_line(ranks)


def _report(console: Console, result: Result, dealt: str | None) -> None:
    from sideroad.cli import render, scores

    kept = "the best validation" if result.kept == "best" else "the last step"
    early = ", stopped early" if result.stopped_early else ""
    console.print(
        f"\ntrained {result.steps} steps in {render.duration(result.seconds)}{early}; kept {kept} "
        f"(step {result.kept_step})",
        soft_wrap=True,
    )
    if dealt is not None:
        console.print(f"ranks dealt to layers: {dealt}", soft_wrap=True)
    if result.speed is not None:
        console.print(_speed(result.speed), soft_wrap=True)
    console.print()
    scores.print_scores(console, result.scores.get("base", {}), result.scores.get("adapted", {}))
    answers = [(sample.prompt, sample.reference, sample.base, sample.adapted) for sample in result.samples]
    scores.print_samples(console, answers)
    console.print()
    for name, what in LEFT_BEHIND.items():
        if (result.run / name).exists():
            console.print(f"{result.run / name!s:<36} {what}", soft_wrap=True)
    run, adapter = shlex.quote(str(result.run)), shlex.quote(str(result.adapter))
    merged = shlex.quote(str(result.run / "merged"))
    console.print("\ntry next:")
    for command in (f"chat {run}", f"evaluate {run}", f"merge {adapter} --out {merged}"):
        console.print(f"  sideroad {command}", soft_wrap=True)
