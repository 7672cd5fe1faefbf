"""`sideroad chat`: talk with a base and its adapters, and switch between them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sideroad.cli import frame

SUMMARY = "Talk with a base and its adapters."
EXAMPLES = (
    "sideroad chat runs/quickstart",
    "sideroad chat formal=runs/formal short=runs/short",
    "echo 'Play some jazz' | sideroad chat runs/quickstart",
)

Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ADAPTER | NAME=ADAPTER]...",
        help="Run or adapter directories of one base; the first one speaks first.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens with this probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws, where the temperature is above 0.")]


def run(
    adapters: Adapters = None,
    base: frame.BaseModel = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: frame.Device = "auto",
    offline: frame.Offline = False,
    debug: frame.Debug = False,
) -> None:
    """Chat with a base and adapters; answers appear as they are written, and Ctrl-C stops one.

    Inside: /adapter NAME switches, /base leaves adapters out, /reset forgets the conversation, /help, /quit. What is
    piped into stdin is answered line by line.
    """
    places = named_places(adapters or [])
    from sideroad.cli import render
    from sideroad.cli.conversation import Conversation, Sampling, talk
    from sideroad.cli.progress import Bar
    from sideroad.cli.session import open_session
    from sideroad.errors import ConfigError

    if not places and base is None:
        raise ConfigError("give at least one run or adapter directory, or --base MODEL.")
    with Bar(render.console(to_stderr=True)) as bar:
        session = open_session(places, base, device=device, offline=offline, bar=bar)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    raise typer.Exit(talk(Conversation(session, sampling, speaker=next(iter(places), None))))


def named_places(words: list[str]) -> dict[str, Path]:
    """Read `PATH` or `NAME=PATH` arguments; a path without a name is called after its run or directory.

    Raises:
        ConfigError: a name is empty or given twice.
        AdapterError: nothing usable is at a path.
    """
    from sideroad.cli.locate import adapter_dir, adapter_name
    from sideroad.errors import ConfigError

    places: dict[str, Path] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        if not equals or os.path.exists(word):
            name, rest = "", word
        elif not name or not rest:
            raise ConfigError(f'"{word}" is neither a directory nor NAME=DIRECTORY.')
        directory = adapter_dir(Path(rest))
        name = name or adapter_name(directory)
        if name in places:
            raise ConfigError(f'two adapters are called "{name}"; give one another name: NAME={rest}')
        places[name] = directory
    return places
