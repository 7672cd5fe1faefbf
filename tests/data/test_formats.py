from __future__ import annotations

from typing import Any

import pytest

from sideroad.data.config import DataConfig
from sideroad.data.formats import detect, read_examples
from sideroad.data.messages import Example
from sideroad.data.readers import Row
from sideroad.errors import DataError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return [Row(item, f"t.jsonl:{n}", f"t.jsonl line {n}") for n, item in enumerate(values, 1)]


def read(*values: dict[str, Any], templated: bool = True, **config: Any) -> tuple[str, tuple[Example, ...]]:
    rows = rows_of(*values)
    layout = detect(rows, DataConfig(train="-", **config))
    return layout.describe(), read_examples(rows, layout, templated=templated)


@pytest.mark.parametrize(
    ("row", "described"),
    [
        ({"messages": CHAT}, "chat (messages)"),
        ({"messages": CHAT, "tools": [], "id": 3}, "chat (messages, tools); not used: id"),
        ({"messages": CHAT, "prompt": "a"}, "chat (messages); not used: prompt"),
        ({"conversations": CHAT}, "chat (messages ← conversations)"),
        ({"conversations": SHARE}, "sharegpt (conversations)"),
        ({"messages": SHARE}, "sharegpt (conversations ← messages)"),
        ({"conversations": SHARE, "system": "s"}, "sharegpt (conversations, system)"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion (prompt, completion)"),
        ({"prompt": "a", "response": "b"}, "prompt-completion (prompt, completion ← response)"),
        ({"question": "a", "answer": "b"}, "prompt-completion (prompt ← question, completion ← answer)"),
        ({"input": "a", "output": "b"}, "prompt-completion (prompt ← input, completion ← output)"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca (instruction, output, input)"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca (instruction, output); not used: text"),
        (
            {"instruction": "a", "context": "", "response": "b"},
            "alpaca (instruction, output ← response, input ← context)",
        ),
        ({"text": "a"}, "text (text)"),
        ({"text": "a", "url": "u"}, "text (text); not used: url"),
    ],
)
def test_the_format_is_seen_in_the_columns(row: dict[str, Any], described: str) -> None:
    found, examples = read(row)
    assert found == described
    assert len(examples) == 1


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["a", "b"], "unknown format; columns found: a, b (t.jsonl line 1)"),
        (
            ["text", "label"],
            "data.columns: {prompt: text, completion: label}; to train on the text alone: data.format: text",
        ),
        (["text", "targets"], "To train on the text alone: data.format: text"),
        (["instruction", "input", "output", "rejected", "chosen"], "preference pairs"),
        (["prompt", "chosen", "rejected"], "set data.columns: {completion: chosen}"),
    ],
)
def test_an_unknown_format_lists_columns_and_needs(columns: list[str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(dict.fromkeys(columns, "x"))
    assert words in str(caught.value)
    assert "unknown format" in str(caught.value)
    assert "alpaca             instruction, output; optional input" in str(caught.value)


def test_two_formats_are_ambiguous() -> None:
    row = {"messages": CHAT, "prompt": "a", "completion": "b"}
    with pytest.raises(
        DataError, match=r"the format is ambiguous, chat and prompt-completion fit; columns found: messages"
    ):
        read(row)
    assert read(row, format="chat")[0] == "chat (messages); not used: prompt, completion"


def test_columns_are_mapped() -> None:
    row = {"q": "a", "sql": "b", "text": "c"}
    described, (example,) = read(row, columns={"prompt": "q", "completion": "sql"})
    assert described == "prompt-completion (prompt ← q, completion ← sql); not used: text"
    assert [m.content for m in example.messages] == ["a", "b"]
    assert (
        read(
            {"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"},
            columns={"output": "chosen"},
        )[1][0]
        .messages[1]
        .content
        == "c"
    )
    assert read({"text": "a", "label": "b"}, columns={"prompt": "text", "completion": "label"})[0].startswith(
        "prompt-comp"
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "q"}, 'unknown name "promt". Did you mean "prompt"?'),
        ({"prompt": "quest"}, 'there is no column "quest". Did you mean "question"? Columns found: question, answer'),
    ],
)
def test_a_wrong_mapping_is_explained(columns: dict[str, str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"question": "a", "answer": "b"}, columns=columns)
    assert words in str(caught.value)


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(
        DataError, match=r"data.format: alpaca needs the column instruction and output; columns found: text"
    ):
        read({"text": "a"}, format="alpaca")


def test_alpaca_with_and_without_a_template() -> None:
    row = {"instruction": "Do", "input": "this", "output": "done"}
    assert read(row)[1][0].messages[0].content == "Do\n\nthis"
    assert read({**row, "input": " "})[1][0].messages[0].content == "Do"
    plain = read(row, templated=False)[1][0].messages[0].content
    assert plain == "### Instruction:\nDo\n\n### Input:\nthis\n\n### Response:\n"
    assert (
        read({**row, "input": ""}, templated=False)[1][0].messages[0].content
        == "### Instruction:\nDo\n\n### Response:\n"
    )


def test_pairs_of_message_lists_train_on_the_completion_only() -> None:
    prompt = [*CHAT, {"role": "user", "content": "c"}]
    (example,) = read({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})[1]
    assert [(m.content, m.weight) for m in example.messages] == [("a", 0), ("b", 0), ("c", 0), ("d", 1)]
    (mixed,) = read({"prompt": prompt, "completion": "d", "system": "s"})[1]
    assert [m.role for m in mixed.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_rows_that_do_not_fit_are_named_with_line_and_field() -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError) as caught:
        read(good, {"prompt": "a"}, {"prompt": "a", "completion": None}, {"prompt": "a", "completion": 5}, good)
    text = str(caught.value)
    assert text.startswith("3 rows do not fit the format prompt-completion (prompt, completion).")
    assert 't.jsonl line 2: "completion" is missing (columns here: prompt)' in text
    assert 't.jsonl line 3: "completion" is null' in text
    assert "t.jsonl line 4: \"completion\" must be text; found '5' (int)" in text


def test_a_message_without_content_names_the_line() -> None:
    with pytest.raises(DataError, match=r"^t.jsonl line 2: message 1: the user message has no content; its keys"):
        read({"messages": CHAT}, {"messages": [{"role": "user"}]})


def test_many_bad_rows_are_cut_at_twenty() -> None:
    with pytest.raises(DataError, match=r"… and 10 more"):
        read(*[{"prompt": "a", "completion": 1}] * 30)


def test_an_empty_text_row_is_refused() -> None:
    with pytest.raises(DataError, match=r't.jsonl line 1: "text" is empty'):
        read({"text": " "})
