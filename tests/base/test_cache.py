"""Entries are whole or absent, whoever builds them and however that ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sideroad.base.cache import cache_dir, clear, entries, models_dir, provide, read_record, require_space
from sideroad.errors import BaseModelError

KEY = "thing--1--c1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "cache"))


def build(work: Path, entry: Path) -> dict[str, str]:
    (work / "scratch").write_text("x" * 100)
    (entry / "weights").write_text("data")
    return {"package": "p"}


def visible() -> list[str]:
    return sorted(path.name for path in models_dir().iterdir() if not path.name.endswith(".lock"))


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SIDEROAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sideroad"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "sideroad"


def test_an_entry_is_built_once_and_recorded() -> None:
    path = provide(KEY, build)
    assert provide(KEY, lambda work, entry: pytest.fail("built twice")) == path
    record = read_record(path)
    assert record == {"package": "p", "files": {"weights": 4}}
    assert visible() == [KEY]
    assert (path / "weights").stat().st_mode & 0o777 == 0o644


def test_a_failed_build_leaves_nothing() -> None:
    def fail(work: Path, entry: Path) -> dict[str, str]:
        build(work, entry)
        raise BaseModelError("broken")

    with pytest.raises(BaseModelError, match=r"broken"):
        provide(KEY, fail)
    assert visible() == []
    assert provide(KEY, build).is_dir()


def test_an_interrupt_leaves_nothing() -> None:
    def interrupt(work: Path, entry: Path) -> dict[str, str]:
        build(work, entry)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        provide(KEY, interrupt)
    assert visible() == []


def test_a_damaged_entry_is_replaced() -> None:
    path = provide(KEY, build)
    (path / "weights").write_text("dat")
    assert read_record(path) is None
    provide(KEY, build)
    assert (path / "weights").read_text() == "data"
    assert visible() == [KEY]


def run(code: str) -> subprocess.Popen[str]:
    head = "import os, sys, time\nfrom pathlib import Path\nfrom sideroad.base.cache import provide\n"
    return subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_counts() -> None:
    code = (
        "def build(work, entry):\n (entry / 'weights').write_text('half')\n os.kill(os.getpid(), 9)\n"
        f"provide({KEY!r}, build)"
    )
    assert run(code).wait(timeout=60) == -9
    assert [name.startswith(".partial-") for name in visible()] == [True]
    assert entries() == ()
    path = provide(KEY, build)
    assert (path / "weights").read_text() == "data"
    assert visible() == [KEY]


def test_two_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "def build(work, entry):\n"
        f" open({str(log)!r}, 'a').write('built\\n')\n"
        " time.sleep(1)\n (entry / 'weights').write_text('data')\n return {}\n"
        "seen = []\n"
        f"path = provide({KEY!r}, build, on_progress=seen.append)\n"
        "print([item.stage for item in seen], (path / 'weights').read_text())"
    )
    both = [run(code), run(code)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert log.read_text() == "built\n"
    assert said == ["['waiting'] data", "[] data"]


def test_clearing() -> None:
    provide(KEY, build)
    provide("thing--2--c1", build)
    provide("other--1--c1", build)
    assert [entry.name for entry in entries()] == ["other", "thing", "thing"]
    size = sum(entry.bytes for entry in entries() if entry.name == "thing")
    assert clear("thing") == size > 0
    assert visible() == ["other--1--c1"]
    assert clear("smollm2-135m-instruct") == 0
    with pytest.raises(BaseModelError, match=r'no model named "othr".*Did you mean "other".*In the cache: other'):
        clear("othr")
    clear()
    assert visible() == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match=r"cannot write to the model cache .* Set SIDEROAD_CACHE"):
        provide(KEY, build)


def test_a_full_disk_is_noticed_first() -> None:
    require_space(1)
    with pytest.raises(BaseModelError, match=r"MB free; 1,000,000,000,000 MB are needed. Free space, or set SIDEROAD"):
        require_space(10**18)
