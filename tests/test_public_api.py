"""The names a person imports: exactly these, all documented, none swallowing unknown arguments."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import sideroad

NAMES = {
    "Adapter", "AdapterConfig", "AdapterError", "Attached", "BaseConfig", "BaseModelError", "CheckpointError",
    "ConfigError", "DataError", "LoraMethod", "LowRank", "MergeError", "Recipe", "SideroadError", "TargetError",
    "TrainingError", "attach", "attached", "load_base", "load_recipe", "resolve",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(sideroad.__all__) == NAMES
    assert set(dir(sideroad)) == {*NAMES, "__version__"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_there_documented_and_explicit(name: str) -> None:
    thing = getattr(sideroad, name)
    assert inspect.getdoc(thing)
    assert not inspect.ismodule(thing)
    if inspect.isfunction(thing):
        kinds = {parameter.kind for parameter in inspect.signature(thing).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
        assert inspect.Parameter.VAR_POSITIONAL not in kinds


def test_no_public_name_is_also_a_module() -> None:
    folder = Path(sideroad.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not modules & NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sideroad.trian


def test_every_error_has_its_exit_code() -> None:
    codes = {name: getattr(sideroad, name).exit_code for name in NAMES if name.endswith("Error")}
    assert codes == {
        "SideroadError": 1, "ConfigError": 2, "DataError": 3, "BaseModelError": 4, "AdapterError": 5,
        "TargetError": 5, "MergeError": 5, "TrainingError": 6, "CheckpointError": 6,
    }  # fmt: skip
