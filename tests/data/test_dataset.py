"""Loading as a whole: findings, statistics, hashes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import template_families as families

from sideroad.data.config import DataConfig
from sideroad.data.dataset import Loaded, content_hash, load_data
from sideroad.data.encode import Encoded
from sideroad.data.findings import Finding, refuse
from sideroad.errors import DataError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ROWS = [{"prompt": f"what is {word}?", "completion": f"it is {word}"} for word in WORDS]


def chat(*turns: tuple[str, str], weight: int = 1) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": text, **({"weight": weight} if role == "assistant" else {})}
            for role, text in turns
        ]
    }


def load(
    directory: Path,
    rows: list[dict[str, Any]],
    *,
    template: str | None = families.CHATML,
    validation: Any = None,
    max_positions: int | None = None,
    family: dict[str, Any] | None = None,
    **settings: Any,
) -> Loaded:
    for name, content in (("train", rows), ("validation", validation or [])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    config = DataConfig(train="train.jsonl", validation="validation.jsonl" if validation else None, **settings)
    return load_data(config, families.family(template, **(family or {})), root=directory, max_positions=max_positions)


def found(loaded: Loaded) -> dict[str, Finding]:
    return {finding.code: finding for finding in loaded.findings}


def test_clean_data_has_only_its_description(tmp_path: Path) -> None:
    loaded = load(tmp_path, ROWS)
    assert [str(finding) for finding in loaded.findings] == [
        "train.jsonl: prompt-completion (prompt, completion) (columns)"
    ]
    refuse(loaded.findings)
    train = loaded.train
    assert train.format == "prompt-completion"
    assert len(train.examples) == len(train.raw) == 12
    assert [item.source for item in train.examples] == [raw.source for raw in train.raw]
    assert train.lengths == tuple(len(item) for item in train.examples)


def test_statistics(tmp_path: Path) -> None:
    statistics = load(tmp_path, [*ROWS, chat_pair_without_answer()], template=families.CHATML).train.statistics
    assert (statistics.rows, statistics.sequences) == (13, 12)
    assert statistics.left_out == {"dropped": 1}
    assert statistics.length_min <= statistics.length_median <= statistics.length_p95 <= statistics.length_max
    assert statistics.trained_fraction == statistics.trained_tokens / statistics.tokens
    assert statistics.to_json()["left_out"] == {"dropped": 1}


def chat_pair_without_answer() -> dict[str, Any]:
    return {"prompt": "hello there " * 600, "completion": "b"}


def test_numbers_of_a_known_set(tmp_path: Path) -> None:
    loaded = load(tmp_path, [{"text": "abc"[: n % 3 + 1] * n} for n in range(1, 12)], template=None)
    lengths = sorted(loaded.train.lengths)
    statistics = loaded.train.statistics
    assert (statistics.length_min, statistics.length_median, statistics.length_max) == (
        lengths[0],
        lengths[5],
        lengths[-1],
    )
    assert statistics.tokens == sum(lengths)
    assert statistics.trained_tokens == sum(lengths) - 11


def test_the_hash_follows_the_content_alone(tmp_path: Path) -> None:
    first = load(tmp_path, ROWS).train
    (tmp_path / "elsewhere").mkdir()
    again = load(tmp_path / "elsewhere", ROWS).train
    assert (first.sha256, first.files) == (again.sha256, again.files)
    other = load(tmp_path, [*ROWS[:-1], {**ROWS[-1], "completion": "it is Twelve"}]).train
    assert other.sha256 != first.sha256
    masked = load(tmp_path, ROWS, train_on="all").train
    assert masked.sha256 != first.sha256
    assert masked.files == first.files
    assert load(tmp_path, ROWS[::-1]).train.sha256 != first.sha256


def test_the_hash_is_written_in_stone() -> None:
    rows = [Encoded([1, 2, 70000], [False, True, True], "a:1"), Encoded([5, 6], [False, True], "a:2")]
    assert content_hash(rows) == "1f7d1971137d17e6e385281255bb75d1fe8e3b83752d41c752ab4e37509bfd24"
    assert content_hash([replace(rows[0], source="b:9"), rows[1]]) == content_hash(rows)


def test_limits(tmp_path: Path) -> None:
    loaded = load(tmp_path, ROWS, validation=ROWS, limit=5, validation_limit=2)
    assert loaded.validation is not None
    assert (loaded.train.statistics.rows, loaded.validation.statistics.rows) == (5, 2)


def case(**given: Any) -> dict[str, Any]:
    return given


BAD = {
    "refused": case(rows=[*(chat(("user", r["prompt"]), ("user", "b")) for r in ROWS)], template=families.LLAMA2),
    "nothing-trained-at-all": case(rows=[chat(("user", "a"), ("assistant", "b"), weight=0)] * 12),
    "everything-trained-at-all": case(
        rows=[chat(("assistant", word)) for word in WORDS],
        template="{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}",
    ),
    "end-of-turn-untrained": case(rows=ROWS, template=families.CHATML_NO_END),
    "doubled-bos": case(rows=ROWS, template="{{ bos_token + bos_token }}" + families.CHATML),
    "overlong": case(rows=ROWS, max_length=8, overlong="error"),
    "beyond-model": case(rows=ROWS, max_positions=8),
}


@pytest.mark.parametrize("code", BAD)
def test_what_is_broken_is_refused(tmp_path: Path, code: str) -> None:
    loaded = load(tmp_path, **BAD[code])
    assert found(loaded)[code].severity == "error"
    with pytest.raises(DataError) as caught:
        refuse(loaded.findings)
    assert f"({code})" in str(caught.value)


def test_half_of_a_character_is_refused_with_its_line(tmp_path: Path) -> None:
    loaded = load(tmp_path, [*ROWS, {"prompt": "a \ud83d b", "completion": "c"}])
    refused = found(loaded)["refused"]
    assert refused.severity == "error"
    assert refused.examples[0].startswith("train.jsonl:13: the text is not Unicode: half of a character, '\\ud83d'")


def test_half_of_a_character_in_plain_text_is_refused(tmp_path: Path) -> None:
    assert found(load(tmp_path, [{"text": "a \ud83d b"}]))["refused"].count == 1


def test_tools_that_the_template_leaves_out_are_told(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "let me see", "tool_calls": [call]}]
    described = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    for row in ({"messages": turns}, {**chat(("user", "a"), ("assistant", "b")), "tools": [described]}):
        finding = found(load(tmp_path, [*[chat(("user", "a"), ("assistant", "b"))] * 3, row]))["lost-content"]
        assert finding.examples == ("train.jsonl:4: no trace of the tool 'weather'",)


def test_errors_come_at_once(tmp_path: Path) -> None:
    loaded = load(tmp_path, ROWS, template="{{ bos_token + bos_token }}" + families.CHATML_NO_END)
    with pytest.raises(
        DataError, match=r"(?s)the data cannot be trained on: 2 problems.*doubled-bos.*end-of-turn-untrained"
    ):
        refuse(loaded.findings)


def test_no_eos_without_a_template_is_refused(tmp_path: Path) -> None:
    loaded = load(tmp_path, ROWS, template=None, family={"eos": None})
    assert found(loaded)["end-of-turn-untrained"].message.startswith("the tokenizer has no EOS token")


SOFT = {
    "nothing-trained": case(
        rows=[*(chat(("user", r["prompt"]), ("assistant", "b")) for r in ROWS), chat(("user", "a"))]
    ),
    "dropped": case(rows=[*ROWS, chat_pair_without_answer()]),
    "truncated-answer": case(
        rows=[*ROWS, {"prompt": "a", "completion": "hello there " * 600}], overlong="truncate-end"
    ),
    "end-of-turn-missing": case(
        rows=[*ROWS, {"prompt": "a", "completion": "hello there " * 600}], overlong="truncate-end"
    ),
    "truncated-prompt": case(rows=[*ROWS, chat_pair_without_answer()], overlong="truncate-prompt"),
    "joined-token": case(rows=[*ROWS, {"prompt": "what is ", "completion": "the answer"}], template=None),
    "empty-answer": case(rows=[*ROWS, {"prompt": "a", "completion": ""}]),
    "lost-content": case(
        template=families.QWEN3,
        rows=[
            *(
                chat(
                    ("user", r["prompt"]),
                    ("assistant", "<think>\nhm\n</think>\n\nb"),
                    ("user", "c"),
                    ("assistant", "d"),
                )
                for r in ROWS
            )
        ],
    ),
    "rewritten-content": case(rows=[*ROWS, {"prompt": " a ", "completion": "b"}], template=families.CHATML_STRIP),
    "special-token": case(rows=[*ROWS, {"prompt": "a</s>", "completion": "b"}]),
    "duplicates": case(rows=[*ROWS, {"prompt": "What is  one?", "completion": "it is one"}]),
    "few-rows": case(rows=ROWS[:9]),
    "dated-template": case(rows=ROWS, template=families.CHATML + "{{ '' if strftime_now('%Y') }}"),
    "everything-trained": case(rows=[*ROWS, {"prompt": "", "completion": "b"}], template=None),
}


@pytest.mark.parametrize("code", SOFT)
def test_what_is_odd_is_told_and_not_refused(tmp_path: Path, code: str) -> None:
    loaded = load(tmp_path, **SOFT[code])
    assert found(loaded)[code].severity in ("warning", "note")
    refuse(loaded.findings)
    for finding in loaded.findings:
        if finding.examples and finding.count == 1:
            assert finding.examples[0].startswith("train.jsonl:13")


def test_a_clean_set_next_to_each_odd_one_is_silent(tmp_path: Path) -> None:
    for template in (families.CHATML, families.LLAMA2, families.PHI3, families.QWEN3, None):
        eos = {"eos": "<|endoftext|>"} if template == families.PHI3 else {}
        assert [f.code for f in load(tmp_path, ROWS, template=template, family=eos).findings] == ["columns"]


def test_rows_without_a_trained_token_never_become_examples(tmp_path: Path) -> None:
    loaded = load(tmp_path, [*(chat(("user", r["prompt"]), ("assistant", "b")) for r in ROWS), chat(("user", "a"))])
    assert len(loaded.train.examples) == 12
    assert all(item.trained_tokens for item in loaded.train.examples)
    assert loaded.train.statistics.left_out == {"nothing-trained": 1}


def test_validation_rows_and_prompts_in_train_are_found(tmp_path: Path) -> None:
    validation = [ROWS[0], {**ROWS[1], "completion": "dunno"}, {"prompt": "new?", "completion": "yes"}]
    codes = found(load(tmp_path, ROWS, validation=validation))
    assert codes["validation-in-train"].examples == ("validation.jsonl:1",)
    assert codes["validation-prompt-in-train"].examples == ("validation.jsonl:2",)
    assert "1 of 3 rows of validation also in train" in codes["validation-in-train"].message


def test_findings_of_validation_say_so(tmp_path: Path) -> None:
    loaded = load(tmp_path, ROWS, validation=[*ROWS, chat_pair_without_answer()])
    (dropped,) = [finding for finding in loaded.findings if finding.code == "dropped"]
    assert dropped.message.startswith("validation: 1 of 13 rows above max_length 512, left out")


def test_several_sources_are_read_in_order(tmp_path: Path) -> None:
    for name, part in (("b.jsonl", ROWS[:2]), ("a.jsonl", ROWS[2:4])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    loaded = load_data(DataConfig(train=["b.jsonl", "a.jsonl"]), families.family(families.CHATML), root=tmp_path)
    assert [item.source for item in loaded.train.examples] == ["b.jsonl:1", "b.jsonl:2", "a.jsonl:1", "a.jsonl:2"]


def test_plain_text_ends_with_eos_whatever_ends_a_turn(tmp_path: Path) -> None:
    rows = [{"text": f"this is {word}"} for word in WORDS]
    loaded = load(tmp_path, rows, template=families.PHI3, family={"eos": "<|endoftext|>"})
    assert [finding.code for finding in loaded.findings] == ["columns"]
    broken = load(tmp_path, rows, template=families.PHI3, family={"eos": None})
    assert found(broken)["end-of-turn-untrained"].message.startswith("the tokenizer has no EOS token")
