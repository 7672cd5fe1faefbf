"""`sideroad chat`: piped turns, commands, several adapters, streaming, interrupts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from terminal import call
from tiny import tiny_tokenizer

from sideroad.cli.conversation import Conversation, Sampling, TokenStream
from sideroad.cli.progress import Bar
from sideroad.cli.render import console
from sideroad.cli.session import Session, open_session

SHORT = ("--max-new-tokens", "5")


@pytest.fixture(scope="module")
def session(run: Path) -> Session:
    return open_session({"task": run}, None, bar=Bar(console(to_stderr=True)))


def talk(session: Session) -> Conversation:
    return Conversation(session, Sampling(max_new_tokens=5, temperature=0.0, top_p=1.0, seed=0), speaker="task")


def test_piped_turns_are_answered_line_by_line(run: Path) -> None:
    spoken = call("chat", run, *SHORT, stdin="light in room 3\n/reset\n\n/base\nlight in room 3\n/quit\nnever\n")
    assert spoken.code == 0, spoken.err
    alone = call("generate", run, "light in room 3", *SHORT).out
    base = call("generate", "--base", run.parents[1] / "tiny-llama", "light in room 3", *SHORT).out
    assert spoken.out == alone + base
    assert "forgotten" in spoken.err
    assert "now: tiny-llama, without an adapter" in spoken.err


def test_history_is_kept_until_reset(session: Session) -> None:
    chat = talk(session)
    first = chat.answer("hi", lambda text: None)
    second = chat.answer("hi", lambda text: None)
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"] * 2
    chat.command("/reset")
    assert chat.history == []
    assert chat.answer("hi", lambda text: None) == first
    assert first != second


def test_commands_and_their_near_misses(session: Session) -> None:
    chat = talk(session)
    assert chat.command("/adapter") == "adapters: task (now)"
    assert chat.command("/base") == "now: tiny-llama, without an adapter"
    assert chat.speaker is None
    assert chat.command("/adapter tsk") == 'no adapter is called "tsk". Did you mean "task"? Loaded: task'
    assert chat.command("/adapter task") == "now: adapter task"
    assert chat.speaker == "task"
    assert chat.command("/adaptor x") is not None
    assert 'Did you mean "/adapter"?' in str(chat.command("/adaptor x"))
    assert "/reset" in str(chat.command("/help"))
    assert chat.command("/quit") is None
    assert "no adapter is loaded" in str(Conversation(Session(session.base), chat.sampling).command("/adapter x"))


def test_several_adapters_by_name(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "twin")
    spoken = call(
        "chat", f"one={run}", tmp_path / "twin", "--base", run.parents[1] / "tiny-llama", *SHORT,
        stdin="hi\n/reset\n/adapter twin\nhi\n",
    )  # fmt: skip
    assert spoken.code == 0, spoken.err
    first, second = spoken.out.removesuffix("\n").split("\n")
    assert first == second
    assert "now: adapter twin" in spoken.err


def test_one_name_twice_and_no_adapter(run: Path) -> None:
    spoken = call("chat", run, run / "adapter")
    assert spoken.code == 2
    assert 'two adapters are called "task"' in spoken.err
    spoken = call("chat")
    assert spoken.code == 2
    assert "--base MODEL" in spoken.err


def test_too_long_a_turn_does_not_end_the_chat_but_decides_its_code(run: Path) -> None:
    spoken = call("chat", run, *SHORT, stdin=f"{'x' * 600}\nhi\n")
    assert spoken.code == 4
    assert "512 positions" in spoken.err
    assert spoken.out == call("generate", run, "hi", *SHORT).out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(session: Session) -> None:
    chat, written = talk(session), list[str]()

    def interrupt(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    said = chat.answer("hi", interrupt)
    assert " [stopped]" in written
    assert chat.history[-1] == {"role": "assistant", "content": said}
    whole = talk(session).answer("hi", lambda text: None)
    assert whole.startswith(said)
    assert len(said) < len(whole)


def test_a_character_is_written_once_its_bytes_are_there() -> None:
    tokenizer, written = tiny_tokenizer(), list[str]()
    stream = TokenStream(tokenizer, written.append)
    for token in tokenizer("aéb")["input_ids"]:
        stream.take(token)
    stream.finish()
    assert [text for text in written if text] == ["a", "é", "b"]
