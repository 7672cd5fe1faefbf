"""A run written down: every setting with its default, read strictly from YAML, changed key by key, written back.

Loading one takes neither torch nor transformers, so the command line can answer `--help` at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from sideroad.base.config import BaseConfig
from sideroad.config import AdapterConfig, EvaInit, LoraGaInit, Settings, validate
from sideroad.data.config import DataConfig
from sideroad.errors import ConfigError, did_you_mean, raise_findings
from sideroad.method_config import METHODS
from sideroad.train.evaluate_config import EvaluateConfig
from sideroad.train.settings import OptimConfig, TrainConfig

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".jinja")
SUFFIXES = (".yaml", ".yml")

KINDS = (*METHODS, EvaInit, LoraGaInit)
"""Sections that a `kind` tells apart."""

_CORE_SCALARS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class Recipe(Settings):
    """Everything that decides a run's result but the machine."""

    base: BaseConfig
    """The model to adapt; it stays as it is."""
    adapter: AdapterConfig = AdapterConfig()
    """Which layers are adapted, and how."""
    data: DataConfig
    """What to learn from."""
    optim: OptimConfig = OptimConfig()
    """Optimizer, schedule, batch."""
    train: TrainConfig = TrainConfig()
    """Length, validation, checkpoints."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Scores and samples after training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Source of the seeds of initialisation, data order and dropout, each derived from it on its own."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Recipe:
        needs = []
        if self.data.validation is None:
            if self.train.keep == "best":
                needs.append("train.keep: best")
            if self.train.early_stopping is not None:
                needs.append("train.early_stopping")
            if self.evaluate.metrics:
                needs.append("evaluate.metrics")
        if needs:
            raise ValueError(f"{', '.join(needs)} cannot work without a validation set; give data.validation")
        return self


class _Reader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `1e-3` is a number, `on`, `off`, `yes`, `no`, dates and `1:30` are words."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Writer(yaml.SafeDumper):
    """Quotes exactly what `_Reader` would otherwise take for something else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out."""
        return True


for _kind in (_Reader, _Writer):
    for _tag, _pattern, _first in _CORE_SCALARS:
        _kind.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _construct_int(reader: _Reader, node: yaml.ScalarNode) -> int:
    return int(reader.construct_scalar(node))


def _construct_mapping(reader: _Reader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = reader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int):
            raise ConfigError(f"line {line}: a key must be a word, found {key!r}")
        if key in seen:
            raise ConfigError(f'line {line}: key "{key}" is given twice, first in line {seen[key]}; keep one')
        seen[key] = line
    return {
        reader.construct_object(key, deep=True): reader.construct_object(value, deep=True) for key, value in node.value
    }


_Reader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Reader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `overrides`.

    Relative data paths are relative to the recipe file; those in an override, typed at a prompt, are relative to the
    current directory when they exist there. Both come back absolute, so that the recipe may be written anywhere.

    Args:
        overrides: `key.key=value`, the value in YAML, such as `optim.lr=1e-4` or `adapter.targets=[q_proj, v_proj]`.
    Raises:
        ConfigError: no such file, broken YAML, a key given twice, and all unknown keys and wrong values at once.
    """
    path = Path(path)
    values = _read(path)
    folder = path.resolve().parent
    _locate(values, folder, folder)
    changed = _override(values, overrides)
    _locate(values, Path.cwd(), folder, only=changed)
    where = f"{path} with --set {', '.join(changed)}" if changed else str(path)
    return validate(Recipe, values, where)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that `load_recipe` reads back to an equal one."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


def parse_value(text: str) -> Any:
    """One YAML value with the recipe's rules for numbers and words.

    Raises:
        yaml.YAMLError, ConfigError: not one YAML value.
    """
    return yaml.load(text, Loader=_Reader)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(_missing(path))
    try:
        values = parse_value(path.read_text(encoding="utf-8-sig"))
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); a recipe is a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path} must hold keys such as base, data and optim; found {found}")
    return values


def _missing(path: Path) -> str:
    if path.is_dir():
        resolved = path / "recipe.yaml"
        hint = f" For the recipe of that run: {resolved}" if resolved.is_file() else ""
        return f"recipe {path} is a directory; give the YAML file.{hint}"
    folder = path.parent
    if not folder.is_dir():
        return f"recipe {path} does not exist: there is no directory {folder}. Give the path of a YAML file."
    present = sorted(item.name for item in folder.iterdir() if item.suffix in SUFFIXES)
    listed = f" Recipes in {folder}: {', '.join(present)}." if present else f" There is no recipe in {folder}."
    return f"recipe {path} does not exist.{listed}{did_you_mean(path.name, present)}"


def _override(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write each override into `values`; returns the dotted keys."""
    findings, changed = [], []
    for item in overrides:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            findings.append(f'--set "{item}" is not key=value; write for example --set optim.lr=1e-4')
            continue
        try:
            value = parse_value(text)
        except (yaml.YAMLError, ConfigError) as error:
            findings.append(f'--set "{item}": the value is not YAML: {" ".join(str(error).split())}')
            continue
        section = values
        for part in parts[:-1]:
            nested = section.get(part)
            if not isinstance(nested, dict):
                nested = section[part] = {}
            section = nested
        if parts[-1] == "kind" and value != section.get("kind"):
            _leave_kind(section)
        section[parts[-1]] = value
        changed.append(key.strip())
    raise_findings(ConfigError, "--set", findings)
    return changed


def _leave_kind(section: dict[str, Any]) -> None:
    """Drop what a resolved recipe says of the kind that is left, where it is a default: the new kind has its own."""
    former = next((one for one in KINDS if one.model_fields["kind"].default == section.get("kind", "lora")), None)
    for key in list(section):
        field = former.model_fields.get(key) if former else None
        if field is not None and section[key] == field.default:
            del section[key]


def _locate(values: dict[str, Any], *folders: Path, only: Sequence[str] | None = None) -> None:
    """Make local data paths and a local base absolute, looking in `folders` in turn; hub ids stay as they are."""
    data, base = values.get("data"), values.get("base")
    if isinstance(data, dict):
        for key in ("train", "validation", "chat_template"):
            if key in data and (only is None or f"data.{key}" in only):
                data[key] = _located(data[key], folders)
    if isinstance(base, dict) and isinstance(base.get("model"), str) and (only is None or "base.model" in only):
        for folder in folders:
            local = folder / base["model"]
            if (local / "config.json").is_file() or (local.suffix == ".gguf" and local.is_file()):
                base["model"] = str(local.resolve())
                break


def _located(value: Any, folders: Sequence[Path]) -> Any:
    if isinstance(value, list):
        return [_located(item, folders) for item in value]
    if not isinstance(value, str) or not value.strip():
        return value
    given = Path(os.path.expanduser(value))
    for folder in folders:
        if (folder / given).exists():
            return str((folder / given).resolve())
    local = given.is_absolute() or value.startswith(".") or given.suffix in DATA_SUFFIXES
    return str(folders[-1] / given) if local else value
