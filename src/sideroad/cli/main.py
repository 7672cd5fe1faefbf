"""The `sideroad` command: its verbs in the order in which a person meets them."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup

import sideroad
from sideroad.cli import chat, evaluate, generate, inspect, merge, models, preview, targets, train
from sideroad.cli.frame import HELP, Verb, write_examples

VERBS = (train, preview, targets, models, evaluate, generate, chat, merge, inspect)

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
EXAMPLES = ("sideroad train examples/quickstart.yaml", "sideroad chat runs/quickstart")


class _Root(TyperGroup):
    """Keeps the verbs in the order of `VERBS`, shows examples below them, and answers `--version` and `--help`.

    These two by hand: with an option of its own, this group would make typer load pydantic before any verb's help.
    """

    def list_commands(self, ctx: object) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] == ["--version"]:
            typer.echo(f"sideroad {sideroad.__version__}")
            raise typer.Exit
        if args[:1] and args[0] in HELP:
            typer.echo(ctx.get_help(), color=ctx.color)
            raise typer.Exit
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Options"):
            formatter.write_dl([("--version", "Show the version and exit."), ("-h, --help", "Show help and exit.")])
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: object, formatter: object) -> None:
        write_examples(self.epilog, formatter)


def _root() -> None:
    """Adapt a language model with low-rank updates: see what is trained, train it, measure it, use it."""


def build() -> typer.Typer:
    """The application with every verb; plain help, since rich's costs a person a sixth of a second each time."""
    app = typer.Typer(
        cls=_Root,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        add_help_option=False,
    )
    app.callback(epilog="\n".join(EXAMPLES))(_root)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        texts = {"short_help": verb.SUMMARY, "epilog": "\n".join(verb.EXAMPLES)}
        app.command(name, cls=Verb, context_settings=CONTEXT, **texts)(verb.run)
    return app


app = build()


def main() -> None:
    """Entry point of the `sideroad` script and of `python -m sideroad`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal without Unicode shows escapes in place of an error.
            stream.reconfigure(errors="backslashreplace")
    app()
