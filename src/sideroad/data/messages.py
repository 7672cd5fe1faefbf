"""Messages and examples: what a row means before it is text, and how plain JSON becomes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sideroad.errors import DataError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        content: its text; empty where the turn only calls tools.
        tool_calls: OpenAI-shaped calls; arguments are mappings, as Hugging Face templates expect.
        weight: 1 if an assistant turn is trained on, 0 if it is only context.
        extra: further keys of the row's message (`name`, `tool_call_id`, `reasoning_content` …), for the template.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    weight: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """Return the mapping that a chat template reads."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content, **self.extra}
        if self.tool_calls:
            plain["tool_calls"] = [dict(call) for call in self.tool_calls]
        return plain


@dataclass(frozen=True)
class Example:
    """One row, understood: either messages or plain text.

    Attributes:
        source: file name and line (or row) number, such as `train.jsonl:7`.
        messages: the conversation; empty for plain text.
        text: the document of a plain-text row, else None.
        tools: function descriptions the template may show.
    """

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def has_answer(self) -> bool:
        """Whether there is an assistant turn that `prompt_of` can split off."""
        return any(message.role == "assistant" for message in self.messages)


def prompt_of(example: Example) -> tuple[tuple[Message, ...], str]:
    """Split an example at its last assistant turn.

    Returns:
        The messages before that turn, and its text as the reference (its tool calls as JSON where it has no text).
    Raises:
        DataError: the example has no assistant turn.
    """
    for index in range(len(example.messages) - 1, -1, -1):
        message = example.messages[index]
        if message.role == "assistant":
            calls = json.dumps([dict(call) for call in message.tool_calls], ensure_ascii=False)
            return example.messages[:index], message.content or (calls if message.tool_calls else "")
    raise DataError(f"{example.source}: there is no assistant turn to compare an answer with")


def read_messages(value: object, *, context_only: bool = False) -> tuple[Message, ...]:
    """Check a `messages` list (or its JSON text) and return it as messages.

    Args:
        context_only: give assistant turns weight 0 (the prompt of a prompt/completion pair).
    Raises:
        DataError: what is wrong with which message; all of it.
    """
    items = _list_of_objects(value, "messages")
    if not items:
        raise DataError("messages is empty; a conversation needs at least one message")
    found: list[Message] = []
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        try:
            found.append(_read_message(item, context_only))
        except DataError as error:
            problems.append(f"message {number}: {error}")
    if problems:
        raise DataError("; ".join(problems))
    return tuple(found)


def read_sharegpt(value: object) -> tuple[Message, ...]:
    """Check a `conversations` list of from/value pairs (or role/content ones) and return it as messages.

    Raises:
        DataError: what is wrong with which message; all of it.
    """
    items = _list_of_objects(value, "conversations")
    if items and all("from" not in item for item in items):
        return read_messages(items)
    plain: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        speaker, text = item.get("from"), item.get("value")
        role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            hint = did_you_mean(str(speaker), SHAREGPT_ROLES)
            problems.append(f'message {number}: unknown speaker {speaker!r} in "from".{hint} '
                            f"Allowed: {', '.join(SHAREGPT_ROLES)}")
        elif speaker == "function_call":
            plain.append({"role": role, "content": None, "tool_calls": _calls_of_text(text, number, problems)})
        else:
            rest = {key: item[key] for key in item if key not in ("from", "value")}
            plain.append({"role": role, "content": text, **rest})
    if problems:
        raise DataError("; ".join(problems))
    return read_messages(plain)


def read_tools(value: object) -> tuple[Mapping[str, Any], ...]:
    """Check a `tools` column: a list of function descriptions, its JSON text, or nothing."""
    if value is None or value == "":
        return ()
    return tuple(_without_nulls(item) for item in _list_of_objects(value, "tools"))


def _read_message(item: Mapping[str, Any], context_only: bool) -> Message:
    known = {key: value for key, value in item.items() if value is not None}
    role = known.pop("role", None)
    if role == "function":
        role = "tool"
    if role not in ROLES:
        if role is None and "from" in known:
            raise DataError('it has "from" instead of "role"; set data.format: sharegpt')
        raise DataError(f"unknown role {role!r}.{did_you_mean(str(role), ROLES)} Allowed: {', '.join(ROLES)}")
    calls = tuple(_read_call(call) for call in _list_of_objects(known.pop("tool_calls", None) or [], "tool_calls"))
    if calls and role != "assistant":
        raise DataError(f"tool_calls belong to the assistant, not to {role}")
    if "content" not in known and not calls:
        nor = " and no tool_calls" if role == "assistant" else ""
        raise DataError(f"the {role} message has no content{nor}; its keys are {', '.join(item)}. Give it text")
    content = _text_of(known.pop("content", ""))
    weight = known.pop("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"weight must be 0 or 1; found {weight!r}")
    if role != "assistant" and "weight" in item and item["weight"] is not None:
        raise DataError(f"weight belongs to assistant messages, not to {role}")
    trained = role == "assistant" and int(weight) == 1 and not context_only
    return Message(role, content, calls, int(trained), known)


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"content must be text or a list of text parts; found {_shown(content)}")
    pieces: list[str] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise DataError(f'only content parts {{"type": "text", "text": …}} can be trained on; found {_shown(part)}')
    return "".join(pieces)


def _read_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    call = _without_nulls(call)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call needs a function with a name; found {_shown(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"the arguments of tool call {function['name']!r} are not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of tool call {function['name']!r} must be an object; found {_shown(arguments)}")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _calls_of_text(text: object, number: int, problems: list[str]) -> list[Any]:
    try:
        parsed = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        parsed = None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        problems.append(f'message {number}: a function_call must be JSON with "name" and "arguments"; '
                        f"found {_shown(text)}")
        return []
    return calls


def _list_of_objects(value: object, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is text but not JSON: {error}") from error
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"{name} must be a list of objects; found {_shown(value)}")
    return value


def _without_nulls(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _without_nulls(value) if isinstance(value, Mapping) else value
            for key, value in item.items() if value is not None}


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
