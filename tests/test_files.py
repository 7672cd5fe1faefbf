"""Whole files or none, and strict JSON."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sideroad import files
from sideroad.errors import AdapterError, CheckpointError
from sideroad.files import json_text, read_json, replace_directory, replace_file


def build(directory: Path) -> None:
    (directory / "inner").mkdir()
    (directory / "inner/a.txt").write_text("new")


def old(path: Path) -> Path:
    path.mkdir()
    (path / "a.txt").write_text("old")
    return path


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("exchange", [True, False])
def test_directory_is_made_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda draft, path: False)
    replace_directory(tmp_path / "deep/new", build)
    replace_directory(old(tmp_path / "there"), build)
    for path in (tmp_path / "deep/new", tmp_path / "there"):
        assert (path / "inner/a.txt").read_text() == "new"
    assert not (tmp_path / "there/a.txt").exists()
    assert leftovers(tmp_path) == leftovers(tmp_path / "deep") == []


def test_old_directory_outlives_a_failing_build(tmp_path: Path) -> None:
    def full(directory: Path) -> None:
        build(directory)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = old(tmp_path / "there")
    with pytest.raises(AdapterError, match=r"No space left on device\. What was there before is untouched\. Free some"):
        replace_directory(path, full)
    assert (path / "a.txt").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_old_directory_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path / "there")
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    monkeypatch.setattr(files, "_exchange", lambda draft, path: False)
    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(CheckpointError, match=r"Permission denied.*Check the directory's permissions"):
        replace_directory(path, build, error=CheckpointError)
    assert (path / "a.txt").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_objections_files_and_links_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is not replaced: it is precious\. Choose another path"):
        replace_directory(old(tmp_path / "there"), build, objection=lambda path: "it is precious.")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("file", "link"):
        with pytest.raises(AdapterError, match="exists and is not a directory; nothing was written"):
            replace_directory(tmp_path / name, build)
    (tmp_path / "empty").mkdir()
    replace_directory(tmp_path / "empty", build, objection=lambda path: "never asked")


def test_file_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "in/f", b"1")
    replace_file(tmp_path / "in/f", b"2")
    assert (tmp_path / "in/f").read_bytes() == b"2"

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(AdapterError, match="No space left"):
        replace_file(tmp_path / "in/f", b"3")
    assert (tmp_path / "in/f").read_bytes() == b"2"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="cannot be written"):
        replace_directory(tmp_path / "file/adapter", build)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,}', "line 1, column"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": 1, "a": 2}', "given twice: a"),
        ("[]", "expected an object"),
        ("{} {}", "Extra data at line 1, column 4"),
        ('{"a": ' + "[" * 200_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("", "line 1, column 1"),
    ],
)
def test_json_is_strict(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AdapterError, match=words):
        read_json(tmp_path / "a.json")


def test_json_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(AdapterError, match=r"is not valid JSON.*utf-8"):
        read_json(tmp_path / "a.json")


def test_json_text_is_strict_too() -> None:
    assert json_text({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"a": float("nan")})
