"""drafts: a dead writer's leftovers go with the next save, a living one's stay, and a kill leaves old or new."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sideroad import drafts
from sideroad.drafts import new_draft, sibling, sweep
from sideroad.errors import AdapterError
from sideroad.files import replace_directory


def build(directory: Path) -> None:
    (directory / "a.txt").write_text("new")


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


HOLDING = """
import sys, time
from pathlib import Path
from sideroad.drafts import new_draft
with new_draft(Path(sys.argv[1])) as draft:
    (draft / "half.txt").write_text("half")
    print(draft.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing to tmp_path/there; its first line is its draft's name."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "there")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_living_writers_draft_stays_and_a_killed_ones_goes(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    assert writer.stdout is not None
    draft = writer.stdout.readline().strip()
    replace_directory(tmp_path / "there", build)
    assert names(tmp_path) == [draft, "there"]
    assert names(tmp_path / draft) == ["half.txt"]
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    assert names(tmp_path) == [draft, "there"]
    replace_directory(tmp_path / "there", build)
    assert names(tmp_path) == ["there"]


def test_only_drafts_of_the_same_target_go(tmp_path: Path) -> None:
    ours = [".there.0a1b2c3d.tmp", ".there.0a1b2c3d.old"]
    others = [".there.tmp", ".there.0a1b2c3.tmp", ".there.0a1b2c3d.tmp2", ".there.GGGGGGGG.tmp", "there.0a1b2c3d.tmp",
              ".other.0a1b2c3d.tmp", ".there2.0a1b2c3d.tmp", ".there.x.0a1b2c3d.tmp"]  # fmt: skip
    for name in ours + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("x")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/f").write_text("x")
    (tmp_path / ".there.11111111.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / ".there.22222222.tmp").write_text("a file")
    replace_directory(tmp_path / "there", build)
    kept = [*others, "precious", ".there.11111111.tmp", ".there.22222222.tmp", "there"]
    assert names(tmp_path) == sorted(kept)
    assert (tmp_path / "precious/f").read_text() == "x"


def test_a_failing_save_sweeps_nothing(tmp_path: Path) -> None:
    (tmp_path / ".there.0a1b2c3d.tmp").mkdir()

    def failing(directory: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(AdapterError, match="No space left"):
        replace_directory(tmp_path / "there", failing)
    assert names(tmp_path) == [".there.0a1b2c3d.tmp"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_sweep_at_any_time_takes_nothing_from_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("sideroad.files._exchange", lambda draft, path: False)
    stop = threading.Event()

    def sweeping() -> None:
        while not stop.is_set():
            sweep(tmp_path / "there")

    thread = threading.Thread(target=sweeping)
    thread.start()
    try:
        for _ in range(40):
            replace_directory(tmp_path / "there", build)
            assert names(tmp_path / "there") == ["a.txt"]
    finally:
        stop.set()
        thread.join()
    assert names(tmp_path) == ["there"]


def test_a_draft_that_was_swept_before_it_was_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, made = drafts.sibling, []

    def watched(path: Path, ending: str) -> Path:
        made.append(honest(path, ending))
        return made[-1]

    real = Path.mkdir

    def swept(self: Path, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(drafts, "sibling", watched)
    monkeypatch.setattr(Path, "mkdir", swept)
    with new_draft(tmp_path / "there") as draft:
        assert draft.is_dir()
        assert [draft] == made[1:]


@pytest.mark.parametrize("locks", ["none on this system", "refused by the file system"])
def test_without_locks_saving_works_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    def refused(handle: int, how: int) -> None:
        raise OSError(95, os.strerror(95))

    if locks == "none on this system":
        monkeypatch.setattr(drafts, "fcntl", None)
    else:
        monkeypatch.setattr(drafts.fcntl, "flock", refused)
    (tmp_path / ".there.0a1b2c3d.tmp").mkdir()
    replace_directory(tmp_path / "there", build)
    assert names(tmp_path) == [".there.0a1b2c3d.tmp", "there"]


@pytest.mark.parametrize("name", ["é" * 127, "x" * 255, "🦜" * 63, "short"])
def test_names_as_long_as_a_file_system_allows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (tmp_path / sibling(path, "tmp").name).mkdir()
    assert len(os.fsencode(sibling(path, "tmp").name)) <= 255
    replace_directory(path, build)
    assert names(tmp_path) == [name]
    other = path.with_name(name[:-1] + "y")
    (tmp_path / sibling(other, "tmp").name).mkdir()
    replace_directory(path, build)
    assert len(names(tmp_path)) == 2


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from sideroad.adapter import Adapter
from sideroad.config import AdapterConfig, LoraMethod

home, wanted = Path(sys.argv[1]), int(sys.argv[2])
def adapter(seed):
    draw = torch.Generator().manual_seed(seed)
    return Adapter(AdapterConfig(targets="q", method=LoraMethod(rank=2)), {
        f"m.{n}.q": {"A": torch.randn(2, 8, generator=draw), "B": torch.randn(8, 2, generator=draw)} for n in range(3)},
        manifest={"seed": seed})
old, new = adapter(0), adapter(1)
if sys.argv[3] == "renames":
    from sideroad import files
    files._exchange = lambda draft, path: False

def save(value, moment):
    count = 0
    def traced(frame, event, arg):
        nonlocal count
        ours = "/sideroad/" in frame.f_code.co_filename or frame.f_code.co_filename.endswith("/shutil.py")
        if not ours:
            return None
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return traced
    sys.settrace(traced)
    value.save(home / "a")
    sys.settrace(None)
    return count

old.save(home / "a")
lines = save(old, -1)
found = {"old": 0, "new": 0, "left": 0, "gone": 0}
half, tail = wanted // 2, 150  # half of the moments anywhere, half near the end, where the directory takes its place
moments = [1 + step * lines // half for step in range(half)] + [lines - step * tail // half for step in range(half)]
for moment in moments:
    child = os.fork()
    if child == 0:
        save(new, moment)
        os._exit(1)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise SystemExit(f"not killed at {moment} of {lines}")
    left = [entry for entry in home.iterdir() if entry.name != "a"]
    assert all(entry.name.startswith(".a.") and entry.suffix in (".tmp", ".old") for entry in left), left
    found["left"] += bool(left)
    if not (home / "a").exists():
        assert sys.argv[3] == "renames"
        found["gone"] += 1
        assert any(Adapter.load(entry).same_weights(old) for entry in left)
    else:
        value = Adapter.load(home / "a")
        which = "new" if value.same_weights(new) else "old"
        assert value.same_weights(new if which == "new" else old)
        assert value.manifest == {"seed": int(which == "new")}
        found[which] += 1
    old.save(home / "a")
    assert [entry.name for entry in home.iterdir()] == ["a"], list(home.iterdir())
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("way", "moments"),
    [
        ("exchange", 24),
        pytest.param("exchange", 400, marks=pytest.mark.all),
        pytest.param("renames", 400, marks=pytest.mark.all),
    ],
)
def test_a_kill_at_any_line_of_a_save_leaves_the_old_or_the_new_adapter(
    tmp_path: Path, way: str, moments: int
) -> None:
    """A moment is a line of ours or of shutil. Without an exchange the old one may lie beside, as documented."""
    if way == "exchange" and not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges two directories in one step")
    told = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(moments), way], check=True, capture_output=True, text=True
    )
    found = json.loads(told.stdout)
    assert min(found["old"], found["new"], found["left"]) > 0
    assert found["gone"] <= (moments // 20 if way == "renames" else 0)
