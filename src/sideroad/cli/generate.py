"""`sideroad generate`: one prompt in, one answer out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sideroad.cli import frame

SUMMARY = "Answer one prompt."
EXAMPLES = (
    'sideroad generate runs/quickstart "Play some jazz in the kitchen"',
    'echo "What is a sideroad?" | sideroad generate --base smollm2-135m-instruct',
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN_OR_ADAPTER] [PROMPT]",
        help="A run or adapter directory (leave it out with --base or --adapter), then the prompt; "
        "without a prompt, stdin is read.",
        show_default=False,
    ),
]
AdapterDir = Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="A run or adapter directory.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens with this probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws, where the temperature is above 0.")]
System = Annotated[
    str | None,
    typer.Option("--system", help="System message in place of the one the adapter was trained with; `none` for none."),
]


def run(
    words: Words = None,
    adapter: AdapterDir = None,
    base: frame.BaseModel = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: frame.Device = "auto",
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """Answer one prompt with an adapter, or with a base alone.

    The prompt is written as in training: same chat template, same system message.
    """
    place, prompt = _read(words or [], adapter, alone=base is not None)
    from sideroad.base import generate
    from sideroad.cli import render
    from sideroad.cli.progress import Bar
    from sideroad.cli.session import open_session
    from sideroad.data.template import encode_prompt

    with Bar(render.console(to_stderr=True)) as bar:
        places = {} if place is None else {"adapter": place}
        session = open_session(places, base, device=device, offline=offline, bar=bar)
    name = next(iter(session.adapters), None)
    config = session.prompt_config(name)
    if system is not None:
        config = config.model_copy(update={"system": system})
    tokenizer = session.base.tokenizer
    with session.acting(name):
        ids = encode_prompt([{"role": "user", "content": prompt}], tokenizer, config)
        new = generate(
            session.base, [ids], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )[0]
    answer = str(tokenizer.decode(new, skip_special_tokens=True))
    if as_json:
        render.write_json(
            {
                "answer": answer,
                "prompt": prompt,
                "adapter": None if place is None else str(place),
                "base": session.base.identity.to_json(),
                "prompt_tokens": len(ids),
                "new_tokens": len(new),
                "ended": "length" if len(new) == max_new_tokens else "stop",
            }
        )
    else:
        sys.stdout.write((render.visible(answer) if sys.stdout.isatty() else answer) + "\n")


def _read(words: list[str], adapter: Path | None, *, alone: bool) -> tuple[Path | None, str]:
    """Tell the adapter's directory and the prompt apart; the first word is a directory unless an option said which."""
    from sideroad.cli import render
    from sideroad.errors import ConfigError

    rest = list(words)
    if adapter is None and rest and (not alone or _is_adapter(Path(rest[0]))):
        adapter = Path(rest.pop(0))
    if len(rest) > 1:
        raise ConfigError(f"one prompt at a time; found {len(rest)}. Put quotation marks around the prompt.")
    if adapter is None and not alone:
        raise ConfigError("give a run or adapter directory, or --base MODEL.")
    if not rest and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError("no prompt; give one in quotation marks, or pipe it into stdin.")
    prompt = rest[0] if rest else render.piped_text().read().strip()
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give one in quotation marks, or pipe it into stdin.")
    return adapter, prompt


def _is_adapter(path: Path) -> bool:
    # Not Path.is_file, which fails on a word too long to be a file's name.
    return any(os.path.isfile(place / "adapter_config.json") for place in (path, path / "adapter"))
