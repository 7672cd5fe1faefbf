"""base/adapters: directories stay what they are; repositories give an adapter's files and no others."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import tiny_llama

from sideroad.attaching import attach
from sideroad.base.adapters import adapter_directory
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    attach(tiny_llama(), AdapterConfig(targets="q_proj")).adapter("default").save(tmp_path / "mine" / "adapter")
    return tmp_path / "mine" / "adapter"


@pytest.fixture
def asked(saved: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that has one repository; what it was asked for."""
    said: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        said.update(options, repo_id=repo_id)
        if repo_id != "someone/adapter":
            raise LocalEntryNotFoundError("no such repository\nand more")
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return said


def test_a_local_directory_is_never_asked_of_the_hub(
    saved: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adapter_directory(saved) == saved
    assert adapter_directory(saved.parent, subfolder="adapter") == saved
    monkeypatch.chdir(saved.parent.parent)
    assert adapter_directory("mine/adapter") == Path("mine/adapter")
    assert asked == {}


def test_a_repository_gives_an_adapters_files_and_no_pickle(asked: dict[str, Any], saved: Path) -> None:
    assert adapter_directory("someone/adapter", revision="v1", token="secret") == saved
    assert (asked["revision"], asked["token"], asked["local_files_only"]) == ("v1", "secret", False)
    patterns = asked["allow_patterns"]
    for name, wanted in {
        "adapter_config.json": True, "adapter_model.safetensors": True, "adapter_model-00001-of-2.safetensors": True,
        "sideroad.json": True, "adapter_model.bin": False, "model.safetensors": False, "run.py": False,
    }.items():  # fmt: skip
        assert any(fnmatch(name, pattern) for pattern in patterns) == wanted, name


def test_offline_uses_the_cache_alone(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROAD_OFFLINE", "1")
    adapter_directory("someone/adapter")
    assert asked["local_files_only"]


def test_what_is_nowhere_is_said(asked: dict[str, Any], tmp_path: Path, saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"at someone/else: .*LocalEntryNotFoundError: no such repository\)"):
        adapter_directory("someone/else")
    with pytest.raises(AdapterError, match="there is no adapter at"):
        adapter_directory(tmp_path / "nothing" / "here")
    with pytest.raises(AdapterError, match="is a local directory and has none"):
        adapter_directory(saved, revision="main")
