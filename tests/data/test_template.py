from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import template_families as families

from sideroad.data.config import DataConfig
from sideroad.data.messages import Message
from sideroad.data.template import encode_prompt, open_template
from sideroad.errors import DataError

TALK = [Message("user", "a yes?"), Message("assistant", "no")]


def rendered(template: str | None, system: str | None, talk: list[Message] = TALK, **options: Any) -> str:
    config = DataConfig(train="-", system=system)
    return open_template(families.family(template, **options), config).render(talk)


REST = "<|im_start|>user\na yes?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
DEFAULT = "<|im_start|>system\nYou are a bot<|im_end|>\n"


def test_system_null_keeps_the_templates_default() -> None:
    assert rendered(families.CHATML_DEFAULT, None) == DEFAULT + REST


def test_system_text_and_empty_text_are_messages() -> None:
    assert rendered(families.CHATML_DEFAULT, "be kind") == "<|im_start|>system\nbe kind<|im_end|>\n" + REST
    assert rendered(families.CHATML_DEFAULT, "") == "<|im_start|>system\n<|im_end|>\n" + REST


def test_system_none_leaves_the_turn_out() -> None:
    assert rendered(families.CHATML_DEFAULT, "none") == REST
    assert rendered(families.CHATML, "none") == REST
    # SmolLM2's BOS is the token that opens every turn; it must not be doubled.
    assert rendered(families.CHATML_DEFAULT, "none", bos="<|im_start|>") == REST


def test_system_none_keeps_bos() -> None:
    template = "{{ bos_token }}" + families.CHATML_DEFAULT
    assert rendered(template, "none") == "<s>" + REST


@pytest.mark.parametrize(
    "template", [families.LLAMA2, families.MISTRAL, families.GEMMA, families.PHI3, families.LLAMA3]
)
def test_system_none_changes_nothing_where_there_is_no_default(template: str) -> None:
    assert rendered(template, "none") == rendered(template, None)


@pytest.mark.parametrize("system", [None, "be kind", "", "none"])
def test_a_rows_own_system_message_stays(system: str | None) -> None:
    own = [Message("system", "I am it"), *TALK]
    assert rendered(families.CHATML_DEFAULT, system, own) == "<|im_start|>system\nI am it<|im_end|>\n" + REST


def test_system_none_says_when_it_is_impossible() -> None:
    stuck = "Be good.\n" + families.CHATML
    stuck = stuck.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        1,
    )
    with pytest.raises(
        DataError, match=r'system: none is impossible with this chat template: it opens .* with "Be good'
    ):
        rendered(stuck, "none")


def test_a_system_message_without_a_place_is_refused() -> None:
    with pytest.raises(DataError, match=r"takes no system message; remove data.system .*System role not supported"):
        rendered(families.GEMMA, "be kind")
    with pytest.raises(DataError, match="leaves system messages out"):
        rendered(
            families.CHATML.replace(
                "{{ '<|im_start|>' + m", "{% if m['role'] != 'system' %}{{ '<|im_start|>' + m"
            ).replace("'<|im_end|>\n' }}", "'<|im_end|>\n' }}{% endif %}", 1),
            "be kind",
        )
    with pytest.raises(DataError, match=r"no chat template, so a system message has no place"):
        rendered(None, "be kind")


@pytest.mark.parametrize(
    ("template", "end", "header"),
    [
        (families.CHATML_DEFAULT, "<|im_end|>", "<|im_start|>assistant\n"),
        (families.LLAMA3, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (families.LLAMA2, "</s>", ""),
        (families.MISTRAL, "</s>", ""),
        (families.GEMMA, "<end_of_turn>", "<start_of_turn>model\n"),
        (families.PHI3, "<|end|>", "<|assistant|>\n"),
        (families.ZEPHYR, "</s>", "<|assistant|>\n"),
        (families.FORCED_THINKING, "<|im_end|>", "<|im_start|>assistant\n<think>\n"),
        (families.CHATML_NO_END, None, "<|im_start|>assistant\n"),
    ],
)
def test_turn_end_and_header_are_read_off_the_template(template: str, end: str | None, header: str) -> None:
    eos = "<|endoftext|>" if template is families.PHI3 else "</s>"
    opened = open_template(families.family(template, eos=eos), DataConfig(train="-"))
    assert (opened.turn_end, opened.header) == (end, header)


def test_without_a_template_texts_are_joined() -> None:
    assert rendered(None, None) == "a yes?no</s>"
    assert rendered(None, None, adds_bos=True) == "<s>a yes?no</s>"
    assert rendered(None, None, [Message("user", "<s>a"), TALK[1]], adds_bos=True) == "<s>ano</s>"
    with pytest.raises(
        DataError, match=r"no chat template, so only a prompt with its completion .*user, assistant, user"
    ):
        rendered(None, None, [*TALK, TALK[0]])


def test_a_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(families.PHI3)
    config = DataConfig(train="-", chat_template="own.jinja")
    assert open_template(families.family(None), config, tmp_path).render(TALK).startswith("<|user|>\na yes?<|end|>")
    with pytest.raises(DataError, match=r"data.chat_template: .*no.jinja cannot be read"):
        open_template(families.family(None), DataConfig(train="-", chat_template="no.jinja"), tmp_path)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow gives no character offsets"):
        open_template(Slow(), DataConfig(train="-"))


def test_encode_prompt_takes_plain_mappings() -> None:
    tokenizer = families.family(families.CHATML)
    config = DataConfig(train="-")
    plain = encode_prompt([{"role": "user", "content": "a yes?"}], tokenizer, config)
    assert plain == encode_prompt(TALK[:1], tokenizer, config)
    assert tokenizer.decode(plain) == "<|im_start|>user\na yes?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(DataError, match="either Messages or plain mappings"):
        encode_prompt([TALK[0], {"role": "user", "content": "b"}], tokenizer, config)


def test_encode_prompt_without_a_template_ends_with_the_prompt() -> None:
    tokenizer = families.family(None, adds_bos=True)
    assert tokenizer.decode(encode_prompt(TALK[:1], tokenizer, DataConfig(train="-"))) == "<s>a yes?"
