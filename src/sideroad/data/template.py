"""A tokenizer's chat template as one way from messages to text, and what it says about turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sideroad.data.config import NO_SYSTEM, DataConfig
from sideroad.data.messages import Message, read_messages
from sideroad.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED = "Zq4 question"
_ANSWERED = "Xk7 answer"
_SYSTEM = "Wv9 system"


@dataclass(frozen=True)
class Template:
    """How conversations become text for one tokenizer and one `data.system` setting.

    Without a chat template the texts of a prompt and its completion are joined as they are, with BOS where the
    tokenizer itself would put one, and EOS at the end.

    Attributes:
        source: Jinja text that replaces the tokenizer's own template, or None.
        chat: whether there is a chat template at all.
        system: as `DataConfig.system`.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str | None
    chat: bool
    system: str | None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, generation: bool = False
    ) -> str:
        """Return the text of a conversation.

        Args:
            generation: end where the assistant begins to write.
        Raises:
            DataError: the template refuses the conversation, there is none and the messages need one, or the text is
                not Unicode.
        """
        return _encodable(self._text(messages, tools, generation))

    def _text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation: bool) -> str:
        if not self.chat:
            return self._join(messages, tools, generation)
        has_system = any(message.role in ("system", "developer") for message in messages[:1])
        if self.system is None or has_system:
            return self._apply(messages, tools, generation)
        if self.system != NO_SYSTEM:
            return self._apply([Message("system", self.system), *messages], tools, generation)
        if tools or self._default_system == "":
            return self._apply(messages, tools, generation)
        return self._without_system(messages, generation)

    def document(self, text: str) -> str:
        """Return plain text with BOS where the tokenizer itself would put one, and EOS at the end."""
        return _encodable(self._begin(text) + text + (self.tokenizer.eos_token or ""))

    @cached_property
    def turn_end(self) -> str | None:
        """The token that ends an assistant turn: the first added token after its text; None if there is none."""
        if not self.chat:
            return str(self.tokenizer.eos_token) if self.tokenizer.eos_token else None
        asked = [Message("user", _ASKED), Message("assistant", _ANSWERED)]
        try:
            tail = self._apply(asked, (), False).rpartition(_ANSWERED)[2]
        except DataError:
            return None
        return first_of(tail, self.added_tokens)

    @cached_property
    def header(self) -> str:
        """What the template writes to make the assistant begin, such as `<|im_start|>assistant` and a line end."""
        asked = [Message("user", _ASKED)]
        try:
            begun, plain = self._apply(asked, (), True), self._apply(asked, (), False)
        except DataError:
            return ""
        cut = shared_length(begun, plain)
        # `<|end|>` and `<|assistant|>` begin alike; never cut inside a token's text.
        for token in self.added_tokens:
            at = begun.rfind(token, 0, cut + len(token))
            if at < cut < at + len(token):
                cut = at
        return begun[cut:]

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer turns into one token each wherever they stand, longest first."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return tuple(sorted(added, key=lambda text: (-len(text), text)))

    def _join(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation: bool) -> str:
        roles = [message.role for message in messages]
        plain = roles in (["user"], ["user", "assistant"]) and not tools and not messages[-1].tool_calls
        if not plain or self.system not in (None, NO_SYSTEM):
            raise DataError("the tokenizer has no chat template, so only a prompt with its completion can be written "
                            f"(found: {', '.join(roles) or 'nothing'}); set data.chat_template to a Jinja file")
        text = "".join(message.content for message in messages)
        done = roles[-1] == "assistant" and not generation
        return self._begin(text) + text + ((self.tokenizer.eos_token or "") if done else "")

    def _begin(self, text: str) -> str:
        bos = self.tokenizer.bos_token
        return bos if bos and self._adds_bos and not text.startswith(bos) else ""

    @cached_property
    def _adds_bos(self) -> bool:
        return list(self.tokenizer("a")["input_ids"][:1]) == [self.tokenizer.bos_token_id]

    def _apply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation: bool) -> str:
        plain = [message.for_template() for message in messages]
        try:
            return self._call(plain, tools, generation)
        except TypeError as error:
            failed = error
        try:
            # Some templates join the arguments of a tool call as text; most want them as a mapping.
            return self._call([_arguments_as_text(message) for message in plain], tools, generation)
        except TypeError:
            raise DataError(f"the chat template fails on this conversation: {failed}") from failed

    def _call(self, plain: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                plain, tools=[dict(tool) for tool in tools] or None, chat_template=self.source,
                add_generation_prompt=generation, tokenize=False,
            )
        except (TemplateError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        if not isinstance(text, str):
            raise DataError(f"the tokenizer's chat template gave {type(text).__name__} instead of text")
        return text

    @cached_property
    def _default_system(self) -> str:
        """What stands before the first user turn although no system message was given, but for BOS."""
        talk = [Message("user", _ASKED), Message("assistant", _ANSWERED), Message("user", "Jp2 more")]
        text = self._apply(talk, (), False)
        first = text.partition(_ASKED)[0].removeprefix(self.tokenizer.bos_token or "")
        between = text.partition(_ANSWERED)[2].partition("Jp2 more")[0]
        return "" if between.endswith(first) else first

    def _without_system(self, messages: Sequence[Message], generation: bool) -> str:
        marker = Message("system", _SYSTEM)
        impossible = DataError("data.system: none is impossible with this chat template: it opens every conversation "
                               f'with "{self._default_system[:80]}" and its system turn cannot be told from the rest. '
                               'Use system: "", or give a data.chat_template without one.')
        try:
            turn = self._apply([marker], (), False)
            text = self._apply([marker, *messages], (), generation)
        except DataError as error:
            raise impossible from error
        if not text.startswith(turn) or _SYSTEM not in turn:
            raise impossible
        bos = self.tokenizer.bos_token or ""
        # Where BOS is also the token that opens every turn (SmolLM2), the first turn brings its own.
        keep = bos if bos and turn.startswith(bos) and not text[len(turn):].startswith(bos) else ""
        return keep + text[len(turn):]


def open_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig, root: Path = Path()) -> Template:
    """Bind the tokenizer's chat template, or the recipe's, to the recipe's system setting.

    Raises:
        DataError: the template file is missing, the tokenizer has no offsets, or `system` has no place in the template.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets, so what is trained on cannot be "
                        "marked; use a tokenizer with a tokenizer.json (a fast one)")
    source = None
    if config.chat_template is not None:
        path = root / config.chat_template
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {path} cannot be read: {error}") from error
    template = Template(tokenizer, source, bool(source or tokenizer.chat_template), config.system)
    if config.system is not None and config.system != NO_SYSTEM:
        _check_system(template, config.system)
    return template


def encode_prompt(
    messages: Sequence[Message | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    root: Path = Path(),
) -> list[int]:
    """Return the token ids that end where the assistant begins to write, encoded as training encodes them.

    Args:
        messages: `Message`s, or plain role/content mappings.
        root: where a relative `config.chat_template` starts.
    Raises:
        DataError: the template refuses the conversation, or a message is malformed.
    """
    plain = [item for item in messages if not isinstance(item, Message)]
    if plain and len(plain) < len(messages):
        raise DataError("give either Messages or plain mappings, not both")
    conversation = read_messages(plain) if plain else tuple(item for item in messages if isinstance(item, Message))
    text = open_template(tokenizer, config, root).render(conversation, tools, generation=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def first_of(text: str, tokens: Sequence[str]) -> str | None:
    """Return the token whose text stands first in `text`, the longest of those that begin there, or None."""
    found = [(at, -len(token), token) for token in tokens if (at := text.find(token)) >= 0]
    return min(found)[2] if found else None


def _check_system(template: Template, system: str) -> None:
    if not template.chat:
        raise DataError("data.system: the tokenizer has no chat template, so a system message has no place; "
                        "remove it or set data.chat_template")
    try:
        text = template.render([Message("user", _ASKED)])
    except DataError as error:
        raise DataError("data.system: the chat template takes no system message; "
                        f"remove data.system ({error})") from error
    if system.strip() not in text:
        raise DataError("data.system: the chat template leaves system messages out; remove data.system")


def _encodable(text: str) -> str:
    """Refuse what no tokenizer takes: half of a surrogate pair, from a JSON escape or from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not Unicode: half of a character, {text[error.start]!r}, stands after "
                        f"{text[max(0, error.start - 20) : error.start]!r}; mend or remove it") from error
    return text


def shared_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if "tool_calls" in message:
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return changed
