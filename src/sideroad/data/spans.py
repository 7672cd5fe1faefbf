"""Which characters of a rendered conversation the assistant wrote, found without the template's cooperation.

Prefix rendering comes first: the conversation up to a turn, with the opening of the assistant's answer, must be a
prefix of the whole text, and so must the conversation including the turn. Templates that rewrite earlier turns
(thinking removed) or append something at the end break that; then the turn's content is replaced by a sentinel, and
what differs between the two texts is the turn. Either way the result is checked against the whole text, or there is
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sideroad.data.messages import Message
from sideroad.data.template import Template
from sideroad.errors import DataError

Span = tuple[int, int]
"""First character and the one behind the last."""

_SENTINEL = "Qx0sideroad0xQ"
_NEXT = "Qy1sideroad1yQ"


def assistant_spans(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str
) -> list[Span]:
    """Return the span of every assistant turn of weight 1: behind the generation header, through the end-of-turn token.

    White space behind the end-of-turn token belongs to the template, not to the turn.

    Args:
        text: the whole conversation as `template` renders it.
    Raises:
        DataError: a turn cannot be found in the text beyond doubt.
    """
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant" or not message.weight:
            continue
        span = _by_prefix(template, messages, tools, text, index)
        span = span or _by_sentinel(template, messages, tools, text, index)
        if span is None:
            raise DataError(f"message {index + 1}: cannot tell which part of the rendered text this assistant turn is; "
                            "the chat template rewrites it. Give a simpler data.chat_template")
        spans.append(span)
    return spans


def _by_prefix(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str, index: int
) -> Span | None:
    follower = messages[index + 1].role if index + 1 < len(messages) else None
    previous = messages[index - 1].role if index else None
    # Templates may join neighbouring assistant turns, and then a prefix says nothing about where one ends.
    if "assistant" in (follower, previous):
        return None
    begun = _rendered(template, messages[:index], tools, generation=True)
    done = text if follower is None else _rendered(template, messages[: index + 1], tools)
    if begun is None or done is None or not text.startswith(begun) or not text.startswith(done):
        return None
    start, stop = len(begun), len(done)
    if start >= stop or (template.header and not begun.endswith(template.header)):
        return None
    end = _last_turn_end(template, text, start, stop)
    return (start, end) if end is not None else None


def _last_turn_end(template: Template, text: str, start: int, stop: int) -> int | None:
    """Return the position behind the turn's end token, if only white space and added tokens follow up to `stop`."""
    token = template.turn_end
    if token is None:
        return start + len(text[start:stop].rstrip())
    at = text.rfind(token, start, stop)
    if at < 0:
        return None
    rest = text[at + len(token) : stop]
    for added in template.added_tokens:
        rest = rest.replace(added, "")
    return at + len(token) if not rest.strip() else None


def _by_sentinel(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str, index: int
) -> Span | None:
    marked = list(messages)
    marked[index] = _marked(messages[index])
    shown = _rendered(template, marked, tools)
    if (shown is None or shown.count(_SENTINEL) != 1) and messages[index].tool_calls:
        marked[index] = _marked_call(messages[index])
        shown = _rendered(template, marked, tools)
    if shown is None or shown.count(_SENTINEL) != 1 or _SENTINEL in text:
        return None
    before, _, after = shown.partition(_SENTINEL)
    start = _header_end(template, before)
    if start is None:
        return None
    if index and messages[index - 1].role == "assistant":
        start = _behind(messages[index - 1].content.strip(), before, start)
    own = _until_next(template, marked, tools, index, after)
    token = template.turn_end
    ending = own.find(token) + len(token) if token and token in own else 0
    end = len(text) - len(after) + ending
    fits = text.startswith(before[:start]) and text.endswith(after[ending:]) and end > start
    return (start, end) if fits else None


def _behind(content: str, before: str, start: int) -> int:
    """Move `start` behind the previous turn's text where the template joined two assistant turns into one."""
    at = before.find(content, start) if content else -1
    return at + len(content) if at >= 0 else start


def _until_next(
    template: Template, marked: list[Message], tools: Sequence[Mapping[str, Any]], index: int, after: str
) -> str:
    """Return the part of `after` that cannot belong to the next message: its end token must not be taken for ours."""
    if index + 1 == len(marked):
        return after
    both = [*marked[: index + 1], replace(marked[index + 1], content=_NEXT), *marked[index + 2 :]]
    shown = _rendered(template, both, tools) or ""
    between = shown.partition(_SENTINEL)[2].partition(_NEXT)
    return between[0] if between[1] else after


def _header_end(template: Template, before: str) -> int | None:
    """Return where the generation header ends in the text before the sentinel; a thinking block may follow it."""
    header, token = template.header, template.turn_end
    if header:
        at = before.rfind(header)
        if at >= 0 and not (token and token in before[at + len(header) :]):
            return at + len(header)
        # The opening may hold more than past turns do, such as `<think>`.
        for length in range(len(header) - 1, 3, -1):
            if before.endswith(header[:length]):
                return len(before)
        return None
    # No header of its own ([INST] … [/INST] answer): the turn starts with the white space before its text.
    return len(before.rstrip(" "))


def _rendered(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generation: bool = False
) -> str | None:
    try:
        return template.render(messages, tools, generation=generation)
    except DataError:
        return None


def _marked(message: Message) -> Message:
    thoughts = ("reasoning_content", "thinking", "reasoning")
    kept = {key: value for key, value in message.extra.items() if key not in thoughts}
    return replace(message, content=_SENTINEL, extra=kept)


def _marked_call(message: Message) -> Message:
    first, *rest = message.tool_calls
    call = {**first, "function": {**first["function"], "name": _SENTINEL}}
    return replace(message, tool_calls=(call, *rest))
