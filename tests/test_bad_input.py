"""Bad input: each kind has a test that asserts the words; those that are not here lie where their code is tested.

what is wrong                                             where
--------------------------------------------------------  ---------------------------------------------------------
a damaged adapter directory, byte by byte                 properties/test_file_properties.py, test_adapter.py
a safetensors header that lies                            test_tensor_files.py, properties/test_file_properties.py
a pickle, a model, a file, a near miss as adapter path    test_adapter.py
a path that no file can have, too long, of another user   here
symbolic links in a circle                                here
a file or link out of the directory                       here; a shard: test_tensor_files.py
a full disk: saving an adapter                            here
a full disk: a run, a merge                               train/test_resume.py, compose/test_merge.py
no permission                                             here
a directory of other things in the adapter's place        test_adapter.py; a run's: train/test_run_directory.py
a configuration that contradicts itself or its tensors    here, test_targets.py, test_peft_format.py
targets that match nothing                                test_targets.py, properties/test_target_properties.py
an adapter of another base: shapes, module names          test_fitting.py
an adapter of another base: its recorded name and hash    compose/test_merge.py
two adapters of one name, an empty name                   test_attaching.py
an odd name                                               properties/test_name_properties.py
an adapter that is not attached                           test_handle.py
a merged state used as if it were not                     here, test_handle.py, test_merging.py
a merge that cannot be undone                             here, test_merging.py
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import IDS, file_size_limit, fill, tiny_llama

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, MergeError, SideroadError, TargetError
from sideroad.tensor_files import read_tensors, write_tensors

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "sideroad.json"


def adapter(value: float = 1.0) -> Adapter:
    weights = {"m.0.q": {"A": torch.full((2, 40), value), "B": torch.full((60, 2), value)}}
    return Adapter(AdapterConfig(targets="q", method=LoraMethod(rank=2)), weights, manifest={"value": value})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter().save(tmp_path / "a")
    return tmp_path / "a"


def words(call: Callable[[], object], kind: type[SideroadError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.mark.parametrize("size", [0, 100, 600])
def test_a_file_that_the_system_refuses_leaves_the_old_adapter(saved: Path, size: int) -> None:
    with file_size_limit(size):
        told = words(lambda: adapter(2.0).save(saved))
    assert told == (
        f"{saved} cannot be written: File too large. What was there before is untouched. "
        "The file would pass this system's limit on file sizes."
    )
    assert Adapter.load(saved).same_weights(adapter())
    assert names(saved.parent) == ["a"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "No space left on device. What was there before is untouched. Free some space or choose"),
        (errno.EDQUOT, "Disk quota exceeded. What was there before is untouched. Your quota is used up"),
        (errno.EROFS, "Read-only file system. What was there before is untouched. Choose a path on a disk that can"),
    ],
)
def test_a_disk_that_fails_at_any_call_leaves_the_old_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    """A disk may say so when a directory is made, or only when everything has to be on it."""

    class Failing:
        def __init__(self, name: str, moment: int) -> None:
            self.honest, self.left = getattr(os, name), moment

        def __call__(self, *args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left < 0:
                raise OSError(number, os.strerror(number))
            return self.honest(*args, **kwargs)

    told = []
    for name, moment in [("mkdir", 0), *(("fsync", moment) for moment in range(8))]:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, Failing(name, moment))
            told.append(words(lambda: adapter(2.0).save(saved)))
        assert names(saved.parent) == ["a"]
        placed = "is written and in its place, but the system cannot say that it is on the disk" in told[-1]
        assert Adapter.load(saved).same_weights(adapter(2.0 if placed else 1.0))
        assert placed or fix in told[-1]
        assert placed == (moment == 7)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Act as a user without rights, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_place() -> Iterator[Path]:
    """A directory that everybody can reach; pytest's own is for its owner only."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


def test_no_permission_is_told_and_changes_nothing(shared_place: Path) -> None:
    home = shared_place / "home"
    adapter().save(home / "a")
    tries: dict[str, tuple[Path, int]] = {"read only": (home, 0o555), "closed": (home / "a", 0), "all": (home, 0)}
    for path, mode in tries.values():
        os.chmod(path, mode)
        with as_nobody():
            told = words(lambda: adapter(2.0).save(home / "a"))
            assert told == (
                f"{home / 'a'} cannot be written: Permission denied. What was there before is untouched. "
                "Check the directory's permissions or choose another path."
            )
            if mode == 0:
                assert words(lambda: Adapter.load(home / "a")) == (
                    f"{home / 'a'} cannot be read: Permission denied. Check the path and its permissions."
                )
        os.chmod(path, 0o755)
        assert Adapter.load(home / "a").same_weights(adapter())
        assert names(home) == ["a"]
    for name in (CONFIG, WEIGHTS, MANIFEST):
        os.chmod(home / "a" / name, 0)
        with as_nobody():
            assert f"{name} cannot be read: Permission denied" in words(lambda: Adapter.load(home / "a"))
        os.chmod(home / "a" / name, 0o644)


def test_links_in_a_circle(saved: Path) -> None:
    home = saved.parent
    (home / "one").symlink_to(home / "two")
    (home / "two").symlink_to(home / "one")
    (home / "self").symlink_to("self")
    for name in ("one", "self"):
        told = words(lambda name=name: Adapter.load(home / name))  # type: ignore[misc]
        assert told.endswith("is a symbolic link that leads to nothing or in a circle. Give the directory itself.")
        assert "there is no adapter at" in words(lambda name=name: Adapter.load(home / name / "a"))  # type: ignore[misc]
        told = words(lambda name=name: adapter().save(home / name))  # type: ignore[misc]
        assert "exists and is not a directory; nothing was written. Choose another path or remove it." in told
        told = words(lambda name=name: adapter().save(home / name / "a"))  # type: ignore[misc]
        assert "symbolic links in a circle; choose another path" in told
    assert names(home) == ["a", "one", "self", "two"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_file_that_links_in_a_circle_or_away(saved: Path, name: str) -> None:
    honest = saved.parent / "kept"
    (saved / name).rename(honest)
    (saved / name).symlink_to(name)
    assert f"{name} cannot be read: Symlink loop" in words(lambda: Adapter.load(saved)).replace(
        os.strerror(errno.ELOOP), "Symlink loop"
    )
    (saved / name).unlink()
    (saved / name).symlink_to("nowhere")
    assert f"{name} cannot be read: No such file" in words(lambda: Adapter.load(saved))
    (saved / name).unlink()
    (saved / name).symlink_to(honest)
    told = words(lambda: Adapter.load(saved))
    assert f"{name} is a symbolic link to {honest}, outside its directory. Copy the file itself there." in told
    (saved / name).unlink()
    (saved / name).mkdir()
    assert f"{name} is not an ordinary file" in words(lambda: Adapter.load(saved))


def test_a_shard_that_links_in_a_circle_or_away(saved: Path) -> None:
    tensors = read_tensors(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    write_tensors(saved.parent / "away", tensors)
    (saved / "adapter_model-1.safetensors").symlink_to("adapter_model-2.safetensors")
    (saved / "adapter_model-2.safetensors").symlink_to("adapter_model-1.safetensors")
    (saved / "adapter_model-3.safetensors").symlink_to("../away")
    places = dict(zip(tensors, ("adapter_model-1.safetensors", "adapter_model-3.safetensors"), strict=True))
    (saved / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    told = words(lambda: Adapter.load(saved))
    assert "2 problems" in told
    assert "adapter_model-1.safetensors cannot be read" in told
    assert "adapter_model-3.safetensors is a symbolic link to" in told


@pytest.mark.parametrize("name", ["a\0b", "half \ud800"])
def test_paths_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for call in (lambda: Adapter.load(tmp_path / name), lambda: adapter().save(tmp_path / name)):
        told = words(call)
        assert "has a character that no file's name can have; choose another path." in told
        assert told.isprintable()
    assert names(tmp_path) == []


def test_paths_that_are_too_long(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "/".join(["x" * 200] * 30)):
        assert "cannot be read: File name too long. Check the path" in words(lambda path=path: Adapter.load(path))  # type: ignore[misc]
        assert "cannot be written: File name too long." in words(lambda path=path: adapter().save(path))  # type: ignore[misc]
    assert names(tmp_path) == []


def test_a_file_larger_than_memory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(size: int) -> bytearray:
        raise MemoryError

    monkeypatch.setattr("sideroad.tensor_files.bytearray", exhausted, raising=False)
    size = (saved / WEIGHTS).stat().st_size
    assert words(lambda: Adapter.load(saved)) == (
        f"{saved / WEIGHTS} holds {size} bytes, more than this machine's memory has room for."
    )


def test_a_card_that_is_no_text(tmp_path: Path) -> None:
    assert "card are not JSON or text" in words(lambda: adapter().save(tmp_path / "a", card="half \ud800"))
    assert names(tmp_path) == []


def test_a_file_that_contradicts_itself_and_its_tensors(saved: Path) -> None:
    fields = json.loads((saved / CONFIG).read_text())
    fields |= {"r": 3, "rank_pattern": {"q": 4}, "bias": "lora_only", "exclude_modules": ["q"], "use_qalora": True}
    (saved / CONFIG).write_text(json.dumps(fields))
    assert words(lambda: Adapter.load(saved)).startswith("adapter_config.json: use_qalora is set (True): QA-LoRA")
    (saved / CONFIG).write_text(json.dumps({**fields, "use_qalora": False}))
    told = words(lambda: Adapter.load(saved))
    assert f"{saved} cannot be used: 2 problems" in told
    assert "m.0.q: its tensors have rank 2 but adapter_config.json says 4 (r, rank_pattern)" in told
    assert "target_modules ['q'], with exclude_modules and layers_to_transform, do not cover modules that" in told


def test_a_configuration_that_contradicts_itself() -> None:
    config = AdapterConfig(
        targets="q_proj", exclude=("q_proj",), layers="5", layers_pattern="layers", rank_pattern={"k_proj": 2}
    )
    told = words(lambda: attach(tiny_llama(), config), TargetError)
    assert "layers asks for 5, but LlamaForCausalLM has blocks 0-1 only" in told
    config = config.model_copy(update={"layers": None})
    assert "layers_pattern is set without layers" in words(lambda: attach(tiny_llama(), config), TargetError)


def test_everything_that_a_merged_state_forbids_changes_nothing() -> None:
    model = tiny_llama()
    for name in ("a", "b"):
        fill(attach(model, AdapterConfig(targets="q_proj"), name), name)
    handle = attach(model, AdapterConfig(targets="q_proj"), "c")
    handle.merge("a")
    before = model(IDS).logits
    refused: dict[str, Callable[[], object]] = {
        r"activate() while a is merged into the weights; unmerge() first.": lambda: handle.activate("b"),
        r"using() while a is merged into the weights; unmerge() first.": lambda: handle.using("b").__enter__(),
        r"detach() while a is merged into the weights; unmerge() first.": lambda: handle.detach("b"),
        r'adapter "a" is merged; unmerge() before loading into it.': lambda: handle.load("a", handle.adapter("b")),
        r"already merged: a; unmerge() before merging another set or other weights.": lambda: handle.merge("b"),
        r"already merged: a; unmerge() before merging another set or other weights. ": lambda: handle.merged(
            {"a": 2.0}
        ).__enter__(),
    }
    for expected, call in refused.items():
        assert words(call, MergeError) == expected.rstrip()
    handle.load("b", handle.adapter("c"))
    assert handle.merged_names == ("a",)
    assert torch.equal(model(IDS).logits, before)
    handle.merge(keep_base=False)
    assert words(handle.unmerge, MergeError) == (
        "the base was merged with keep_base=False: its weights are gone; load the base again."
    )
    assert torch.equal(model(IDS).logits, before)
    shown = words(lambda: model.save_pretrained("nowhere"))
    assert "merge_and_unload().save_pretrained(directory)" in shown
    assert not Path("nowhere").exists()
