"""Help, version, exit codes, tracebacks on request, interrupts, broken pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import call

import sideroad
from sideroad.cli import main, models
from sideroad.cli.render import count, duration, share, size, visible, write_json

VERBS = ["train", "preview", "targets", "models", "evaluate", "generate", "chat", "merge", "inspect"]


def fail(error: BaseException) -> None:
    raise error


def test_help_lists_the_verbs_in_order() -> None:
    lines = call("--help").out.splitlines()
    commands = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.startswith("  ")]
    assert commands[: len(VERBS)] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    spoken = call(verb, "--help")
    assert spoken.code == 0
    assert f"Examples:\n  sideroad {verb}" in spoken.out or f"| sideroad {verb}" in spoken.out
    assert "…\n" not in spoken.out


def test_version() -> None:
    assert call("--version").out == f"sideroad {sideroad.__version__}\n"


def test_usage_errors_exit_2() -> None:
    for arguments in (["tarin"], ["train"], ["models", "--jsn"], ["preview", "x.yaml", "-n", "many"]):
        spoken = call(*arguments)
        assert spoken.code == 2
        assert "Usage: " in spoken.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("odd"), 1, "error: ValueError: odd\n  This is not an error sideroad expected; --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (sideroad.errors.MergeError("no"), 5, "error: no"),
    ],
)
def test_errors_become_messages_and_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setattr(models, "_list", lambda: fail(error))
    spoken = call("models")
    assert spoken.code == code
    assert spoken.err.startswith(words)
    assert "Traceback" not in spoken.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_list", lambda: fail(ValueError("odd")))
    assert "Traceback" in call("models", "--debug").err
    monkeypatch.setenv("SIDEROAD_DEBUG", "1")
    assert "Traceback" in call("models").err
    monkeypatch.setenv("SIDEROAD_DEBUG", "0")
    assert "Traceback" not in call("models").err


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "sideroad", "models"]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_every_verb_is_registered_once() -> None:
    assert [verb.__name__.rpartition(".")[2] for verb in main.VERBS] == VERBS


def test_numbers_with_units() -> None:
    assert [count(950), count(12_345), count(4_880_000)] == ["950", "12.3 k", "4.88 M"]
    assert [size(812), size(19_600_000), size(1.1e9)] == ["812 B", "19.6 MB", "1.10 GB"]
    assert [duration(8), duration(245), duration(7380)] == ["8 s", "4 min 05 s", "2 h 03 min"]
    assert duration(float("inf")) == "?"
    assert [share(1, 8), share(1, 0)] == ["12.5 %", "–"]


def test_text_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[31m\r\tb\n") == "a␛[31m␍\tb\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": float("nan"), "b": (1.5, Path("x"))})
    assert capsys.readouterr().out.split() == ["{", '"a":', "null,", '"b":', "[", "1.5,", '"x"', "]", "}"]
