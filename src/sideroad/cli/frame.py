"""What every verb shares before it runs: its options' wording, and how an error becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sideroad.errors import SideroadError

INTERRUPTED = 130
BROKEN_PIPE = 141
UNEXPECTED = 1
HELP = frozenset({"-h", "--help"})

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, such as optim.lr=1e-4; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON and nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is already on this machine.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model: a named model, a hub id, or a directory."),
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: auto, cpu, cuda or mps.")]


def write_examples(epilog: str | None, formatter: Any) -> None:
    """Show an epilog of one command per line the way click shows options."""
    if epilog:
        formatter.write(f"\nExamples:\n{indent(epilog, '  ')}\n")


class Verb(TyperCommand):
    """A command with examples below its help, whose errors become `error: …` on stderr and an exit code.

    The codes are those in `sideroad.errors`, 130 for an interrupt and 141 for a reader that went away. A traceback
    appears only where `--debug` or SIDEROAD_DEBUG asks for it.
    """

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        write_examples(self.epilog, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Answer a call for help at once: typer would first load pydantic to read the flag."""
        if HELP & set(args[: args.index("--")] if "--" in args else args):
            typer.echo(ctx.get_help(), color=ctx.color)
            raise typer.Exit
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command's function, already parsed."""
        debug = bool(ctx.params.get("debug")) or os.environ.get("SIDEROAD_DEBUG", "0") not in ("", "0")
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except (Exception, KeyboardInterrupt) as error:
            if _from_parser(error):
                raise
            if debug:
                traceback.print_exc()
            code, message = _explain(error, debug)
        typer.echo(message, err=True)
        raise typer.Exit(code)


def _explain(error: BaseException, debug: bool) -> tuple[int, str]:
    """Exit code and message."""
    if isinstance(error, SideroadError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted"
    what = f"error: {type(error).__name__}: {error}" if str(error) else f"error: {type(error).__name__}"
    advice = "" if debug else "\n  This is not an error sideroad expected; --debug shows where it came from."
    return UNEXPECTED, what + advice


def _from_parser(error: BaseException) -> bool:
    """Exit, Abort and usage errors are the parser's own, and it reports them."""
    return isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message")
