"""Golden masks: what is trained on, decoded, for every template family."""

from __future__ import annotations

from typing import Any

import pytest
import template_families as families

from sideroad.data.config import DataConfig
from sideroad.data.encode import encode_examples
from sideroad.data.messages import Example, read_messages
from sideroad.data.template import encode_prompt, open_template

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "a yes?"}
AGAIN = {"role": "user", "content": "and b?"}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = answer("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": '{"city": "Paris"}'}}])
RESULT = {"role": "tool", "content": "sunny"}
TWO_TURNS = [USER, answer("no"), AGAIN, answer("the yes")]


def trained_texts(
    template: str, messages: list[dict[str, Any]], *, tools: Any = (), system: str | None = None, **options: Any
) -> list[str]:
    """The decoded runs of trained tokens of one conversation."""
    tokenizer = families.family(template, **options)
    config = DataConfig(train="-", system=system)
    example = Example("rows:1", read_messages(messages), tools=tuple(tools))
    (outcome,) = encode_examples([example], open_template(tokenizer, config), config)
    assert "refused" not in outcome.remarks, outcome.remarks
    assert "joined-token" not in outcome.remarks
    runs: list[list[int]] = []
    marks = [(i, t) for item in outcome.encoded for i, t in zip(item.ids, item.trained, strict=True)]
    for position, (token, trained) in enumerate(marks):
        if trained:
            if not position or not marks[position - 1][1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


GOLDEN: dict[str, tuple[str, list[dict[str, Any]], list[str], dict[str, Any]]] = {
    "chatml": (families.CHATML, TWO_TURNS, ["no<|im_end|>", "the yes<|im_end|>"], {}),
    "chatml, default system": (families.CHATML_DEFAULT, TWO_TURNS, ["no<|im_end|>", "the yes<|im_end|>"], {}),
    "chatml, own system": (families.CHATML_DEFAULT, [SYSTEM, *TWO_TURNS], ["no<|im_end|>", "the yes<|im_end|>"], {}),
    "chatml, generation markers": (families.CHATML_MARKERS, TWO_TURNS, ["no<|im_end|>", "the yes<|im_end|>"], {}),
    "content stripped": (
        families.CHATML_STRIP,
        [USER, answer("  no \n"), AGAIN, answer(" b")],
        ["no<|im_end|>", "b<|im_end|>"],
        {},
    ),
    "content kept": (
        families.CHATML,
        [USER, answer("  no \n"), AGAIN, answer(" b")],
        ["  no \n<|im_end|>", " b<|im_end|>"],
        {},
    ),
    "end only at the end": (families.CHATML_END_LAST, TWO_TURNS, ["no", "the yes\n<|im_end|>"], {}),
    "llama 3": (
        families.LLAMA3,
        [SYSTEM, *TWO_TURNS],
        ["no<|eot_id|>", "the yes<|eot_id|>"],
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
    ),
    "llama 2": (families.LLAMA2, [SYSTEM, *TWO_TURNS], [" no </s>", " the yes </s>"], {}),
    "mistral": (families.MISTRAL, TWO_TURNS, [" no</s>", " the yes</s>"], {}),
    "gemma": (families.GEMMA, TWO_TURNS, ["no<end_of_turn>", "the yes<end_of_turn>"], {}),
    "phi 3": (families.PHI3, TWO_TURNS, ["no<|end|>", "the yes<|end|>"], {"eos": "<|endoftext|>"}),
    "zephyr": (families.ZEPHYR, [SYSTEM, *TWO_TURNS], ["no</s>", "the yes</s>"], {}),
    "qwen 3, thinking removed from the past": (
        families.QWEN3,
        [USER, answer("<think>\nhm\n</think>\n\nno"), AGAIN, answer("<think>\nwell\n</think>\n\nyes")],
        ["no<|im_end|>", "<think>\nwell\n</think>\n\nyes<|im_end|>"],
        {},
    ),
    "qwen 3, reasoning_content": (
        families.QWEN3,
        [USER, answer("no", reasoning_content="hm"), AGAIN, answer("yes", reasoning_content="well")],
        ["no<|im_end|>", "<think>\nwell\n</think>\n\nyes<|im_end|>"],
        {},
    ),
    "qwen 3, tools": (
        families.QWEN3,
        [USER, CALL, RESULT, answer("sun")],
        [
            '<tool_call>\n{"name": "look", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nsun<|im_end|>",
        ],
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
    ),
    "qwen 3, tools in the past": (
        families.QWEN3,
        [USER, {**CALL, "content": "<think>\nhm\n</think>\n\nI look"}, RESULT, answer("sun"), AGAIN, answer("b")],
        [
            'I look\n<tool_call>\n{"name": "look", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "sun<|im_end|>",
            "<think>\n\n</think>\n\nb<|im_end|>",
        ],
        {},
    ),
    "arguments joined as text": (
        families.JOINED_ARGUMENTS,
        [USER, CALL, RESULT, answer("sun")],
        ['<tool_call>\nlook{"city": "Paris"}\n</tool_call><|im_end|>', "<think>\n\n</think>\n\nsun<|im_end|>"],
        {},
    ),
    "thinking opened for the model": (
        families.FORCED_THINKING,
        [USER, answer("no"), AGAIN, answer("<think>\nwell\n</think>\n\nyes")],
        ["no<|im_end|>", "well\n</think>\n\nyes<|im_end|>"],
        {},
    ),
    "weight 0": (
        families.CHATML,
        [USER, answer("no", weight=0), AGAIN, answer("yes", weight=1)],
        ["yes<|im_end|>"],
        {},
    ),
    "weight 0 at the end": (
        families.CHATML,
        [USER, answer("no"), AGAIN, answer("yes", weight=0)],
        ["no<|im_end|>"],
        {},
    ),
    "two assistant turns": (families.CHATML, [USER, answer("no", weight=0), answer("yes")], ["yes<|im_end|>"], {}),
    "two assistant turns, first trained": (
        families.CHATML,
        [USER, answer("no"), answer("yes", weight=0)],
        ["no<|im_end|>"],
        {},
    ),
    "merged assistant turns": (
        families.MERGING,
        [USER, answer("no", weight=0), answer("yes")],
        ["\n\nyes<|im_end|>"],
        {},
    ),
    "merged, first trained": (
        families.MERGING,
        [USER, answer("no"), answer("yes", weight=0), AGAIN, answer("b")],
        ["no", "b<|im_end|>"],
        {},
    ),
    "assistant first": (
        families.CHATML_DEFAULT,
        [answer("hello"), USER, answer("no")],
        ["hello<|im_end|>", "no<|im_end|>"],
        {},
    ),
    "ends with a question": (families.CHATML, [USER, answer("no"), AGAIN], ["no<|im_end|>"], {}),
    "same text in every turn": (
        families.QWEN3,
        [{**USER, "content": "no"}, answer("no"), {**USER, "content": "no"}, answer("no")],
        ["no<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"],
        {},
    ),
    "empty answer": (families.CHATML, [USER, answer("")], ["<|im_end|>"], {}),
    "many bytes a character": (families.CHATML, [USER, answer("où 🦜?")], ["où 🦜?<|im_end|>"], {}),
    "answer with the end token inside": (
        families.CHATML,
        [USER, answer("a<|im_end|>b")],
        ["a<|im_end|>b<|im_end|>"],
        {},
    ),
}


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_trained_text_is_what_the_assistant_says(name: str, trim_offsets: bool) -> None:
    template, messages, expected, options = GOLDEN[name]
    assert trained_texts(template, messages, trim_offsets=trim_offsets, **options) == expected


@pytest.mark.parametrize(
    "name", ["chatml", "llama 3", "llama 2", "mistral", "gemma", "phi 3", "zephyr", "qwen 3, tools"]
)
def test_pad_equal_to_the_end_token_changes_nothing(name: str) -> None:
    template, messages, expected, options = GOLDEN[name]
    end = next(
        token for token in ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>") if token in expected[0]
    )
    assert trained_texts(template, messages, **{**options, "pad": end}) == expected


@pytest.mark.parametrize(
    "name", ["chatml", "chatml, default system", "llama 3", "llama 2", "gemma", "zephyr", "mistral"]
)
def test_a_generation_prompt_is_the_beginning_of_the_training_row(name: str) -> None:
    template, messages, _, options = GOLDEN[name]
    tokenizer = families.family(template, **options)
    for system in (None, "none"):
        config = DataConfig(train="-", system=system)
        example = Example("rows:1", read_messages(messages))
        (outcome,) = encode_examples([example], open_template(tokenizer, config), config)
        (encoded,) = outcome.encoded
        prompt = encode_prompt(example.messages[:-1], tokenizer, config)
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.trained[len(prompt)]
        assert not any(encoded.trained[len(prompt) - 3 : len(prompt)])


def test_a_turn_that_cannot_be_found_is_refused_with_its_number() -> None:
    scrambled = (
        "{% for m in messages %}{{ m['role'] + (m['content'] | reverse | join) + '<|im_end|>' }}{% endfor %}x"
        "{{ messages | length }}"
    )
    config = DataConfig(train="-")
    example = Example("rows:1", read_messages([USER, answer("no"), AGAIN]))
    (outcome,) = encode_examples([example], open_template(families.family(scrambled), config), config)
    assert outcome.remarks["refused"].startswith("message 2: cannot tell which part of the rendered text")
    assert outcome.encoded == ()


def test_a_template_that_refuses_is_quoted() -> None:
    config = DataConfig(train="-")
    example = Example("rows:1", read_messages([USER, AGAIN, answer("no")]))
    (outcome,) = encode_examples([example], open_template(families.family(families.LLAMA2), config), config)
    assert outcome.remarks["refused"] == "the chat template refuses this conversation: roles must alternate"
