"""Loss masks: in random conversations the trained tokens are exactly the assistant's turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import template_families as families
from amounts import AMOUNTS, run
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML, tiny_tokenizer

from sideroad.data.config import DataConfig
from sideroad.data.encode import encode_examples
from sideroad.data.messages import Example, read_messages
from sideroad.data.template import open_template

WORDS = (
    "yes", "no", "assistant", "user", "a", " ", "\n", "  ", "é", "🦜", "?", "<think>", "[", "]", "/", "<|", "|>",
    "im_start", "model", "answer:",
)  # fmt: skip
texts = st.lists(st.sampled_from(WORDS), max_size=6).map("".join) | st.text(max_size=8)
"""Also empty, only white space, and parts of the templates' own marks."""


def ending(token: str, *, before: str = "", strip: bool = False) -> Callable[[str], str]:
    return lambda content: before + (content.strip() if strip else content) + token


FAMILIES: dict[str, tuple[str, Callable[[str], str], dict[str, Any]]] = {
    "chatml": (families.CHATML, ending("<|im_end|>"), {}),
    "chatml, default system": (families.CHATML_DEFAULT, ending("<|im_end|>"), {}),
    "chatml, stripped": (families.CHATML_STRIP, ending("<|im_end|>", strip=True), {}),
    "llama 3": (
        families.LLAMA3,
        ending("<|eot_id|>", strip=True),
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
    ),
    "gemma": (families.GEMMA, ending("<end_of_turn>", strip=True), {}),
    "phi 3": (families.PHI3, ending("<|end|>"), {"eos": "<|endoftext|>"}),
    "zephyr": (families.ZEPHYR, ending("</s>"), {}),
    "mistral": (families.MISTRAL, ending("</s>", before=" "), {}),
    "llama 2": (families.LLAMA2, ending(" </s>", before=" ", strip=True), {}),
}
"""Template, and what of an assistant's turn is trained."""
ALTERNATING = ("mistral", "llama 2")


@st.composite
def conversations(draw: st.DrawFn, *, alternating: bool) -> list[dict[str, Any]]:
    if alternating:
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    else:
        roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    turns: list[dict[str, Any]] = [{"role": role, "content": draw(texts)} for role in roles]
    for turn in turns:
        if turn["role"] == "assistant" and draw(st.integers(0, 3)) == 0:
            turn["weight"] = 0
    return turns


def runs_of(ids: list[int], trained: list[bool], decode: Callable[[list[int]], str]) -> str:
    """Decoded trained tokens; a bar where something untrained lies between."""
    pieces: list[list[int]] = []
    for position, (token, mark) in enumerate(zip(ids, trained, strict=True)):
        if mark and not (position and trained[position - 1]):
            pieces.append([])
        if mark:
            pieces[-1].append(token)
    return "|".join(decode(piece) for piece in pieces)


@pytest.mark.parametrize("name", FAMILIES)
@AMOUNTS
def test_exactly_the_assistant_is_trained(name: str, amount: int) -> None:
    template, trained_text, options = FAMILIES[name]
    config = DataConfig(train="-")
    opened = [open_template(families.family(template, trim_offsets=trim, **options), config) for trim in (True, False)]
    refused: list[str] = []

    @given(turns=conversations(alternating=name in ALTERNATING), which=st.integers(0, 1))
    def check(turns: list[dict[str, Any]], which: int) -> None:
        tokenizer = opened[which].tokenizer
        (outcome,) = encode_examples([Example("rows:1", read_messages(turns))], opened[which], config)
        if "refused" in outcome.remarks:
            refused.append(outcome.remarks["refused"])
            return
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant" and turn.get("weight", 1)]
        expected = "|".join(trained_text(answer) for answer in answers)
        if not outcome.encoded:
            assert not answers
            return
        (row,) = outcome.encoded
        found = runs_of(row.ids, row.trained, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
        if "joined-token" not in outcome.remarks:
            assert found == expected

    run(check, 100, amount)
    assert not refused, refused[:3]


@AMOUNTS
def test_the_byte_tokenizer_of_the_tests_agrees(amount: int) -> None:
    tokenizer, config = tiny_tokenizer(), DataConfig(train="-", max_length=100_000)
    tokenizer.chat_template = CHATML
    opened = open_template(tokenizer, config)

    @given(turns=conversations(alternating=True))
    def check(turns: list[dict[str, Any]]) -> None:
        (outcome,) = encode_examples([Example("rows:1", read_messages(turns))], opened, config)
        answers = [turn for turn in turns if turn["role"] == "assistant" and turn.get("weight", 1)]
        wanted = [turn["content"] + "<|im_end|>" for turn in answers]
        assert ("nothing-trained" in outcome.remarks) == (not wanted)
        for row in outcome.encoded:
            assert runs_of(row.ids, row.trained, tokenizer.decode) == "|".join(wanted)

    run(check, 150, amount)
