from __future__ import annotations

import pytest
import template_families as families

from sideroad.data.config import DataConfig, Overlong
from sideroad.data.encode import Encoded, Outcome, encode_examples, fit, mark
from sideroad.data.messages import Example, Message
from sideroad.data.template import Template, open_template
from sideroad.errors import DataError


def pair(prompt: str, completion: str) -> Example:
    return Example("t.jsonl:1", (Message("user", prompt, weight=0), Message("assistant", completion)))


def encode(example: Example, template: str | None = None, **options: object) -> tuple[Outcome, Template]:
    settings = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    config = DataConfig(train="-", **settings)
    opened = open_template(families.family(template, **options), config)
    (outcome,) = encode_examples([example], opened, config)
    return outcome, opened


def trained_text(outcome: Outcome, opened: Template) -> str:
    return "|".join(
        opened.tokenizer.decode([i for i, t in zip(item.ids, item.trained, strict=True) if t])
        for item in outcome.encoded
    )


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_pairs_without_a_template_train_on_the_completion_and_eos(trim_offsets: bool) -> None:
    outcome, opened = encode(pair("What is a?", " the answer"), trim_offsets=trim_offsets)
    assert outcome.text == "What is a? the answer</s>"
    assert trained_text(outcome, opened) == " the answer</s>"
    assert "joined-token" not in outcome.remarks


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_an_answer_that_begins_inside_a_token_is_remarked_on(trim_offsets: bool) -> None:
    outcome, opened = encode(pair("What is a? ", "the answer"), trim_offsets=trim_offsets)
    assert trained_text(outcome, opened) == " answer</s>"
    assert outcome.remarks["joined-token"] == "1 answers begin inside a token"


def test_plain_text_trains_on_everything_but_the_first_token() -> None:
    outcome, opened = encode(Example("t.txt:1", text="hello there"), adds_bos=True)
    (item,) = outcome.encoded
    assert opened.tokenizer.decode(item.ids) == "<s>hello there</s>"
    assert item.trained == [False] + [True] * (len(item) - 1)
    without, opened = encode(Example("t.txt:1", text="hello there"))
    assert opened.tokenizer.decode(without.encoded[0].ids) == "hello there</s>"
    assert without.encoded[0].trained[0] is False


def test_train_on_all_counts_every_token_but_the_first() -> None:
    outcome, _ = encode(pair("a", "b"), families.CHATML, train_on="all")
    assert outcome.encoded[0].trained == [False] + [True] * (len(outcome.encoded[0]) - 1)
    assert "everything-trained" not in outcome.remarks


def test_split_texts_train_on_each_token_once() -> None:
    text = "one two three a b c d e f g hello there how are you " * 4
    whole = encode(Example("t.txt:1", text=text), max_length=500)[0].encoded[0]
    outcome, _ = encode(Example("t.txt:1", text=text), max_length=16)
    assert all(len(item) <= 16 for item in outcome.encoded)
    targets = [token for item in outcome.encoded for token, t in zip(item.ids, item.trained, strict=True) if t]
    assert targets == whole.ids[1:]


def test_mark_by_untrimmed_and_trimmed_offsets() -> None:
    pieces = ["a", ":", "Ġb", "Ġc"]
    untrimmed, trimmed = [(0, 1), (1, 2), (2, 4), (4, 6)], [(0, 1), (1, 2), (3, 4), (5, 6)]
    for offsets in (untrimmed, trimmed):
        assert mark(offsets, pieces, [(2, 4)]) == ([False, False, True, False], 0)
        assert mark(offsets, pieces, [(3, 6)]) == ([False, False, False, True], 1)
        assert mark(offsets, pieces, [(0, 2), (4, 6)]) == ([True, True, False, True], 0)
    # A gap that no token covers (a tokenizer that drops spaces) is not the token's own.
    assert mark([(0, 2), (3, 4)], ["q:", "b"], [(3, 4)]) == ([False, True], 0)


ROW = Encoded(list(range(10, 22)), [False] * 6 + [True] * 6, "t:1")


@pytest.mark.parametrize(
    ("rule", "limit", "keep_first", "kept", "remark"),
    [
        ("auto", 12, False, [list(range(10, 22))], None),
        ("auto", 11, False, [], "dropped"),
        ("drop", 11, False, [], "dropped"),
        ("split", 11, False, [], "dropped"),
        ("error", 11, False, [], "overlong"),
        ("truncate-end", 11, False, [list(range(10, 21))], "truncated-answer"),
        ("truncate-prompt", 8, False, [list(range(14, 22))], "truncated-prompt"),
        ("truncate-prompt", 8, True, [[10, *range(15, 22)]], "truncated-prompt"),
    ],
)
def test_rows_above_the_limit(
    rule: Overlong, limit: int, keep_first: bool, kept: list[list[int]], remark: str | None
) -> None:
    remarks: dict[str, str] = {}
    config = DataConfig(train="-", overlong=rule, max_length=limit)
    found = fit(ROW, config, remarks, keep_first=keep_first, plain_text=False)
    assert [item.ids for item in found] == kept
    assert list(remarks) == ([remark] if remark else [])
    if rule == "truncate-prompt":
        assert sum(found[0].trained) == 6
        assert not found[0].trained[0]


def test_an_answer_longer_than_the_limit_never_trains_without_its_beginning() -> None:
    config = DataConfig(train="-", overlong="truncate-prompt", max_length=8)
    for answer, keep_first, count in ((7, False, 1), (8, False, 0), (7, True, 1), (8, True, 0)):
        row = Encoded(list(range(20)), [False] * (20 - answer) + [True] * answer, "t:1")
        remarks: dict[str, str] = {}
        assert len(fit(row, config, remarks, keep_first=keep_first, plain_text=False)) == count
        assert ("dropped" in remarks) == (count == 0)


def test_an_answer_behind_the_cut_never_trains() -> None:
    remarks: dict[str, str] = {}
    config = DataConfig(train="-", overlong="truncate-end", max_length=8)
    row = Encoded(list(range(20)), [False] * 8 + [True] * 12, "t:1")
    assert fit(row, config, remarks, keep_first=False, plain_text=False) == ()
    assert remarks == {"dropped": "20 tokens; the answer begins behind the limit"}
    late = Encoded(list(range(20)), [False] * 2 + [True] * 2 + [False] * 16, "t:1")
    remarks.clear()
    assert len(fit(late, config, remarks, keep_first=False, plain_text=False)[0]) == 8
    assert list(remarks) == ["truncated-end"]


def test_a_tokenizer_that_returns_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(train="-")
    opened = open_template(families.family(families.CHATML), config)
    nonsense = {"input_ids": [["input_ids", "attention_mask"]], "offset_mapping": [[(0, 1), (1, 2)]]}
    monkeypatch.setattr(type(opened.tokenizer), "__call__", lambda *_, **__: nonsense)
    with pytest.raises(DataError, match="returned no list of ids with offsets"):
        list(encode_examples([pair("a", "b")], opened, config))
