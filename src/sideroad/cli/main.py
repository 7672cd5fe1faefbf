"""The `sideroad` command: its verbs in the order in which a person meets them."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

import sideroad
from sideroad.cli import chat, evaluate, generate, inspect, merge, models, preview, targets, train
from sideroad.cli.frame import Verb, write_examples

VERBS = (train, preview, targets, models, evaluate, generate, chat, merge, inspect)

EXAMPLES = ("sideroad train examples/quickstart.yaml", "sideroad chat runs/quickstart")


class _InOrder(TyperGroup):
    """Keeps the verbs in the order of `VERBS`, and shows examples below them."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(self.commands)

    def format_epilog(self, ctx: object, formatter: object) -> None:
        write_examples(self.epilog, formatter)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sideroad {sideroad.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adapt a language model with low-rank updates: see what is trained, train it, measure it, use it."""


def build() -> typer.Typer:
    """The application with every verb; plain help, since rich's costs a person a sixth of a second each time."""
    app = typer.Typer(
        cls=_InOrder,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(epilog="\n".join(EXAMPLES))(_root)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        app.command(name, cls=Verb, short_help=verb.SUMMARY, epilog="\n".join(verb.EXAMPLES))(verb.run)
    return app


app = build()


def main() -> None:
    """Entry point of the `sideroad` script and of `python -m sideroad`."""
    app()
