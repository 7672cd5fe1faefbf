from __future__ import annotations

from typing import Any

import pytest

from sideroad.data.messages import Example, Message, prompt_of, read_messages, read_sharegpt, read_tools
from sideroad.errors import DataError

USER = {"role": "user", "content": "a"}


def test_a_conversation_is_read() -> None:
    found = read_messages(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Jo"},
            {
                "role": "assistant",
                "content": None,
                "weight": 0,
                "refusal": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "function", "content": "r"},
            {"role": "assistant", "content": "end", "reasoning_content": "hm"},
        ]
    )
    assert [m.role for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[1].content == "ab"
    assert found[1].extra == {"name": "Jo"}
    assert [m.weight for m in found] == [0, 0, 0, 0, 1]
    assert found[2].for_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert found[4].extra == {"reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "message 1: the user message has no content"),
        ({"role": "user", "content": None}, "message 1: the user message has no content"),
        ({"role": "assistant"}, "has no content and no tool_calls"),
        (
            {"role": "usr", "content": "a"},
            "unknown role 'usr'. Did you mean \"user\"? Allowed: system, developer, user",
        ),
        ({"content": "a"}, "unknown role None"),
        ({"from": "human", "value": "a"}, 'it has "from" instead of "role"; set data.format: sharegpt'),
        ({"role": "user", "content": 5}, "content must be text or a list of text parts; found 5 (int)"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "only content parts"),
        ({"role": "assistant", "content": "a", "weight": 2}, "weight must be 0 or 1; found 2"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight must be 0 or 1; found 0.5"),
        ({"role": "assistant", "content": "a", "weight": True}, "weight must be 0 or 1; found True"),
        ({"role": "assistant", "content": "a", "weight": "1"}, "weight must be 0 or 1; found '1'"),
        ({"role": "user", "content": "a", "weight": 1}, "weight belongs to assistant messages, not to user"),
        (
            {"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]},
            "tool_calls belong to the assistant",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "a tool call needs a function with a name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "of tool call 'f' are not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "must be an object; found []",
        ),
    ],
)
def test_what_is_wrong_with_a_message_is_said(message: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_messages([message])
    assert words in str(caught.value)


def test_every_wrong_message_is_named() -> None:
    with pytest.raises(DataError, match=r"message 1: .*; message 3: "):
        read_messages([{"role": "x", "content": "a"}, USER, {"role": "user"}])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "messages is empty"),
        ("nope", "messages is text but not JSON"),
        ({"role": "user"}, "must be a list of objects"),
        (["a"], "must be a list of objects"),
    ],
)
def test_messages_must_be_a_list_of_objects(value: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_messages(value)


def test_messages_may_be_json_text() -> None:
    assert read_messages('[{"role": "user", "content": "a"}]')[0].content == "a"


def test_sharegpt_speakers_become_roles() -> None:
    found = read_sharegpt(
        [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "b", "weight": 0},
        ]
    )
    assert [m.role for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found[4].weight == 0


def test_sharegpt_mistakes() -> None:
    with pytest.raises(DataError, match=r"message 1: unknown speaker 'humn' in \"from\". Did you mean \"human\"\?"):
        read_sharegpt([{"from": "humn", "value": "a"}])
    with pytest.raises(DataError, match="a function_call must be JSON"):
        read_sharegpt([{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}])
    with pytest.raises(DataError, match="message 1: the user message has no content"):
        read_sharegpt([{"from": "human"}])


def test_tools() -> None:
    assert read_tools(None) == read_tools("") == ()
    assert read_tools('[{"type": "function", "strict": null}]') == ({"type": "function"},)
    with pytest.raises(DataError, match="tools must be a list of objects"):
        read_tools({"type": "function"})


def test_prompt_of_splits_at_the_last_assistant_turn() -> None:
    talk = (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
        Message("user", "e"),
    )
    assert prompt_of(Example("x:1", talk)) == (talk[:3], "d")
    call = Message("assistant", "", ({"function": {"name": "f"}},))
    assert prompt_of(Example("x:1", (talk[0], call))) == (talk[:1], '[{"function": {"name": "f"}}]')
    with pytest.raises(DataError, match="x:1: there is no assistant turn"):
        prompt_of(Example("x:1", text="a"))
    assert not Example("x:1", text="a").has_answer
