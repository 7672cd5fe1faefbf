"""A conversation on a terminal or over a pipe: its state, its commands, and answers token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sideroad.base import generate
from sideroad.cli.render import piped_text, visible
from sideroad.cli.session import Session
from sideroad.data.template import encode_prompt
from sideroad.errors import SideroadError, did_you_mean

COMMANDS = {
    "/adapter": "/adapter NAME   let this adapter answer; without a name, list them",
    "/base": "/base           let the base answer alone",
    "/reset": "/reset          forget the conversation",
    "/help": "/help           this list",
    "/quit": "/quit           leave (so does Ctrl-D)",
}


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass
class Conversation:
    """What has been said so far; `speaker` names the adapter that answers, None is the base."""

    session: Session
    sampling: Sampling
    speaker: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Answer one turn, giving each piece of text to `write` as it comes; the turn joins the history.

        Ctrl-C ends the answer early; what was said until then stays in the history. The turn is taken back when the
        answer fails.

        Raises:
            SideroadError: the prompt does not fit the model or the template refuses it.
        """
        turn = {"role": "user", "content": text}
        base = self.session.base
        config = self.session.prompt_config(self.speaker)
        stream = TokenStream(base.tokenizer, write)
        options = self.sampling
        try:
            with self.session.acting(self.speaker):
                ids = encode_prompt([*self.history, turn], base.tokenizer, config)
                generate(
                    base,
                    [ids],
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    seed=options.seed + len(self.history),
                    on_token=stream.take,
                )
        except KeyboardInterrupt:
            write(" [stopped]")
        stream.finish()
        self.history += [turn, {"role": "assistant", "content": stream.text}]
        return stream.text

    def command(self, line: str) -> str | None:
        """Carry out a `/command`; returns what to tell the person, or None to leave."""
        word, _, argument = line.partition(" ")
        match word:
            case "/quit" | "/exit":
                return None
            case "/help":
                return "\n".join(COMMANDS.values())
            case "/reset":
                self.history.clear()
                return "forgotten"
            case "/base":
                self.speaker = None
                return f"now: {self.session.base.identity.name}, without an adapter"
            case "/adapter":
                return self._switch(argument.strip())
            case _:
                return f'unknown command "{word}".{did_you_mean(word, COMMANDS)} Allowed: {", ".join(COMMANDS)}'

    def _switch(self, name: str) -> str:
        known = list(self.session.adapters)
        if not known:
            return "no adapter is loaded; start with: sideroad chat ADAPTER…"
        if not name:
            return "adapters: " + ", ".join(f"{one} (now)" if one == self.speaker else one for one in known)
        if name not in known:
            return f'no adapter is called "{name}".{did_you_mean(name, known)} Loaded: {", ".join(known)}'
        self.speaker = name
        return f"now: adapter {name}"


class TokenStream:
    """Turns tokens into text as they come, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []

    def take(self, token: int) -> None:
        """Add one token and write what it completes."""
        self._ids.append(token)
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if not whole.endswith("\ufffd"):
            self._advance(whole)

    def finish(self) -> None:
        """Write what is left, complete or not."""
        self._advance(str(self._tokenizer.decode(self._ids, skip_special_tokens=True)))

    def _advance(self, whole: str) -> None:
        if whole.startswith(self.text):
            self._write(whole[len(self.text) :])
            self.text = whole


def talk(conversation: Conversation) -> int:
    """Read turns from stdin until it ends or /quit, and write answers to stdout; remarks go to stderr when piped.

    Returns:
        The exit code: that of the last turn that failed when piped, else 0.
    """
    person = sys.stdin.isatty()
    code = 0
    if person:
        names = ", ".join(conversation.session.adapters) or "none"
        _say(f"base {conversation.session.base.identity.name}, adapters: {names}. /help lists the commands.", person)
    for line in _lines(person):
        if line.startswith("/"):
            told = conversation.command(line)
            if told is None:
                return code
            _say(told, person)
            continue
        try:
            conversation.answer(line, _show if person else _write)
        except SideroadError as error:
            _say(f"error: {error}", person)
            code = 0 if person else error.exit_code
            continue
        _write("\n")
    return code


def _lines(person: bool) -> Iterator[str]:
    """Lines that say something. At the prompt, Ctrl-C clears the line and Ctrl-D ends."""
    if not person:
        yield from (line.strip() for line in piped_text() if line.strip())
        return
    _edit_lines()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:
            _write("\n(/quit or Ctrl-D leaves)\n")
            continue
        if line:
            yield line


def _edit_lines() -> None:
    """Arrow keys and a history of lines, where Python has readline."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what turns it on


def _show(text: str) -> None:
    _write(visible(text))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str, person: bool) -> None:
    stream = sys.stdout if person else sys.stderr
    stream.write(text + "\n")
    stream.flush()
