"""What enters the first adapted block is kept per example, within limits, whatever was asked for before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import records, small_recipe
from torch import Tensor

from sideroad.data.encode import Encoded
from sideroad.train import events, frozen_store
from sideroad.train.frozen_store import FrozenStore
from sideroad.train.run import train

WIDTH = 4


def example(number: int, length: int) -> Encoded:
    return Encoded([number] * length, [False] * length, str(number))


def store(examples: Sequence[Encoded], calls: list[list[str]], folder: Path, memory: int, disk: int) -> FrozenStore:
    def compute(asked: Sequence[Encoded]) -> list[Tensor]:
        calls.append([one.source for one in asked])
        return [torch.full((len(one), WIDTH), float(one.ids[0])) for one in asked]

    row = WIDTH * 4
    return FrozenStore(
        examples, compute, width=WIDTH, dtype=torch.float32, memory_bytes=memory * row, disk_bytes=disk * row,
        file=folder / "frozen.cache",
    )  # fmt: skip


@pytest.mark.parametrize(("memory", "disk", "kept"), [(100, 0, 1.0), (10, 90, 1.0), (10, 8, 0.75), (0, 0, 0.0)])
def test_memory_first_then_the_file_then_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, disk: int, kept: float
) -> None:
    monkeypatch.setattr(frozen_store, "CHUNK_TOKENS", 9)
    examples = [example(number, 4) for number in range(6)]  # neighbourhoods of two
    calls: list[list[str]] = []
    held = store(examples, calls, tmp_path, memory, disk)
    assert held.kept_share == pytest.approx(kept, abs=0.1)
    for order in ((5, 0, 3), (1, 2, 4), (3, 5, 0)):
        for number, found in zip(order, held.get([examples[index] for index in order]), strict=True):
            assert torch.equal(found, torch.full((4, WIDTH), float(number)))
    together = [call for call in calls if len(call) == 2]
    assert len(together) == len({tuple(call) for call in together}) == round(kept * 3)
    assert (held._disk is not None) == (disk > 0)
    assert not (tmp_path / "frozen.cache").exists(), "a killed process would leave it behind"
    held.close()
    assert not (tmp_path / "frozen.cache").exists()


def test_a_disk_without_room_is_noticed_before_it_is_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [example(number, 4) for number in range(6)]
    monkeypatch.setattr(frozen_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    calls: list[list[str]] = []
    held = store(examples, calls, tmp_path, memory=0, disk=100)
    assert held.kept_share == 0
    assert "more than half of what the disk has free" in caplog.text
    assert torch.equal(held.get(examples[2:3])[0], torch.full((4, WIDTH), 2.0))


UPPER = {"targets": ["re:model[.]layers[.]1[.].*_proj"]}


@pytest.mark.usefixtures("quick_plots")
class TestRuns:
    def run(
        self,
        folder: Path,
        model: Path,
        name: str,
        adapter: dict[str, object] = UPPER,
        data: dict[str, object] | None = None,
        **sets: object,
    ) -> list:
        train_sets = {"epochs": 2, "validate_every": 2, **sets}
        recipe = small_recipe(folder, model, adapter=adapter, data=data or {}, train=train_sets)
        notes: list[str] = []
        told = lambda event: notes.append(event.text) if isinstance(event, events.Note) else None  # noqa: E731
        result = train(recipe, folder / name, on_event=told)
        assert not (folder / name / "frozen.cache").exists()
        return [records(result.run), [note for note in notes if "the block below the first adapted layer" in note]]

    @pytest.mark.parametrize("limits", [{}, {"frozen_memory_mb": 0}, {"frozen_memory_mb": 0, "frozen_disk_mb": 0}])
    def test_a_run_that_skips_equals_one_that_does_not(
        self, tmp_path: Path, shared_model_dir: Path, limits: dict[str, int]
    ) -> None:
        kept, notes = self.run(tmp_path, shared_model_dir, "kept", **limits)
        plain, none = self.run(tmp_path, shared_model_dir, "plain", cache_frozen="off")
        assert len(notes) == 1
        assert not none
        assert ("once per example" in notes[0]) == (limits.get("frozen_disk_mb") != 0)
        assert len(kept) == len(plain)
        for one, other in zip(kept, plain, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert one[key] == pytest.approx(other[key], rel=2e-4), key

    def test_what_comes_but_once_is_not_kept(self, tmp_path: Path, shared_model_dir: Path) -> None:
        few = {"epochs": 3, "max_steps": 2}
        assert self.run(tmp_path, shared_model_dir, "few", data={"validation": None}, **few)[1] == []
        # the validation set comes twice
        assert len(self.run(tmp_path, shared_model_dir, "validated", **few)[1]) == 1

    def test_nothing_is_kept_where_the_first_block_is_adapted(self, tmp_path: Path, shared_model_dir: Path) -> None:
        assert self.run(tmp_path, shared_model_dir, "all", adapter={})[1] == []

    def test_padded_rows_skip_too(self, tmp_path: Path, shared_model_dir: Path) -> None:
        found = []
        for cache in ("auto", "off"):
            recipe = small_recipe(
                tmp_path, shared_model_dir, adapter=UPPER, data={"packing": "off"}, train={"cache_frozen": cache}
            )
            found.append(records(train(recipe, tmp_path / cache).run))
        for one, other in zip(*found, strict=True):
            assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=2e-5)
