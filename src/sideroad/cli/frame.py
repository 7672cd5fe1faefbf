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
    """A command with examples below its help, whose errors become `error: …` on stderr and an exit code, without a traceback unless asked for.

    The codes are those in `sideroad.errors`, 130 for an interrupt and 141 for a reader that went away.
    """

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        write_examples(self.epilog, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command's function, already parsed."""
        debug = bool(ctx.params.get("debug")) or os.environ.get("SIDEROAD_DEBUG", "0") not in ("", "0")
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except SideroadError as error:
            code, message = error.exit_code, str(error)
        except KeyboardInterrupt as interrupt:
            code, message = INTERRUPTED, str(interrupt) or "interrupted"
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except Exception as error:
            if _from_parser(error):
                raise
            code, message = UNEXPECTED, _unexpected(error, debug)
        if debug:
            traceback.print_exc()
        typer.echo(message if code == INTERRUPTED else f"error: {message}", err=True)
        raise typer.Exit(code)


def _from_parser(error: Exception) -> bool:
    """Exit, Abort and usage errors are the parser's own, and it reports them."""
    return isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message")


def _unexpected(error: Exception, debug: bool) -> str:
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return what if debug else f"{what}\n  This is not an error sideroad expected; --debug shows where it came from."
