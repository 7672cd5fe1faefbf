"""PEFT's rules for targets and patterns, and their translation to ours and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sideroad.config import AdapterConfig
from sideroad.patterns import is_name
from sideroad.peft_keys import EXPERTS, OUTPUT

_PLAIN = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_SUFFIX = r"re:(.*\.)?"


def their_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return what PEFT's `rank_pattern` or `alpha_pattern` gives a module: the first key that ends its path."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, default)


def is_target(fields: Mapping[str, Any], path: str) -> bool:
    """PEFT's rule: does a configuration adapt the module at this path?"""
    excluded, wanted = fields.get("exclude_modules"), fields.get("target_modules")
    if excluded and _listed(excluded, path):
        return False
    if not wanted or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return True
    if isinstance(wanted, str) or path in wanted:
        return _listed(wanted, path)
    return _listed(wanted, path) and _in_layers(fields, path)


def ends(path: str, name: str) -> bool:
    """PEFT's rule for names in lists: the whole path, or its end from a dot on."""
    return path == name or path.endswith(f".{name}")


def _listed(entries: str | list[str], path: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(ends(path, entry) for entry in entries)


def _in_layers(fields: Mapping[str, Any], path: str) -> bool:
    layers = fields.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = fields.get("layers_pattern") or [r"[^.]*"]
    start = r"(?:^|.*?\.)" if fields.get("layers_pattern") else r".*?\."
    for name in [names] if isinstance(names, str) else names:
        found = re.match(rf"{start}{name}\.(?P<index>\d+)\.", path)
        if found:
            return int(found["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def bare_suffix(fields: Mapping[str, Any], path: str) -> bool:
    """Whether a path is a target only by PEFT's rule before 0.5: a listed name may end it anywhere (`p` in `up`)."""
    wanted = fields.get("target_modules")
    settings = ("exclude_modules", "layers_to_transform", "target_parameters")
    newer = ("rank_pattern" in fields, *map(fields.get, settings))
    old = not any(newer) and isinstance(wanted, list)
    return old and not is_target(fields, path) and any(path.endswith(name) for name in wanted or ())


def our_targets(
    fields: Mapping[str, Any], paths: list[str], kinds: Mapping[str, str] | None = None, *, exact: bool = False
) -> dict[str, Any]:
    """Return targets, exclude, layers and layers_pattern of an `AdapterConfig`.

    Args:
        paths: the modules that have tensors; they are named one by one where our language cannot say the same.
        exact: name every module.
        kinds: of those that are not plain. PEFT's name of an attention means its output projection too, ours does not.
    """
    if exact:
        return {"targets": [our_name(path) for path in paths]}
    stacked = [path for path in paths if (kinds or {}).get(path) == EXPERTS]
    if stacked:
        said = our_targets(fields, [path for path in paths if path not in stacked], kinds)
        targets = [said["targets"]] if isinstance(said["targets"], str) else list(said["targets"])
        if any(said.get(key) for key in ("exclude", "layers")):
            return {"targets": [our_name(path) for path in paths]}
        return said | {"targets": [*targets, *_our_parameters(fields, stacked)]}
    outputs = [path for path in paths if (kinds or {}).get(path) == OUTPUT]
    if outputs:
        owners = {path.rpartition(".")[0] for path in outputs}
        said = _our_targets(fields, [path for path in paths if path not in outputs])
        targets = [said["targets"]] if isinstance(said["targets"], str) else list(said["targets"])
        if owners <= set(paths) and not any(said.get(key) for key in ("exclude", "layers")):
            return said | {"targets": [*targets, *map(our_name, outputs)]}
        return {"targets": [our_name(path) for path in paths]}
    return _our_targets(fields, paths)


def _our_targets(fields: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    wanted, excluded = fields.get("target_modules"), fields.get("exclude_modules") or []
    layers, names = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    layers = [layers] if isinstance(layers, int) else layers or None
    names = [names] if isinstance(names, str) else names
    exact: dict[str, Any] = {"targets": [our_name(path) for path in paths]}
    whole = isinstance(wanted, str) and wanted.lower() == "all-linear"
    limited = layers is not None
    if not wanted or (limited and (isinstance(wanted, str) or set(wanted) & set(paths))):
        return exact
    if limited and (len(names) > 1 or any(not _PLAIN.fullmatch(name) for name in names)):
        return exact
    if isinstance(wanted, str):
        targets: str | list[str] = "all-linear" if whole else f"re:{wanted}"
    else:
        targets = [our_name(name) for name in wanted if name.strip()]
    return {
        "targets": targets or exact["targets"],
        "exclude": [f"re:{excluded}"] if isinstance(excluded, str) else [our_name(e) for e in excluded if e.strip()],
        "layers": layers,
        "layers_pattern": names[0] if names and limited else None,
    }


def their_targets(config: AdapterConfig, paths: list[str], *, exact: bool = False) -> dict[str, Any]:
    """Say the same in PEFT's language where it can, else name every module.

    Args:
        exact: name every module.
    """
    if exact or not paths:
        return {"target_modules": paths}
    wanted, excluded = _their_wanted(config, paths), _in_their_words(config.exclude, regex=True)
    fields: dict[str, Any] = {"target_modules": wanted}
    if config.exclude:
        fields["exclude_modules"] = excluded
    if config.layers is not None:
        fields |= {"layers_to_transform": list(config.layers), "layers_pattern": config.layers_pattern}
    sayable = wanted and excluded is not None and not isinstance(config.layers, str)
    if sayable and all(is_target(fields, path) for path in paths):
        return fields
    return {"target_modules": paths}


def _their_wanted(config: AdapterConfig, paths: list[str]) -> str | list[str] | None:
    """Targets as a list of names or one regular expression; None where PEFT has no such words."""
    targets = [config.targets] if isinstance(config.targets, str) else list(config.targets)
    if targets == ["all-linear"]:
        return _covering_names(paths) if config.layers is None and not config.exclude else None
    return _in_their_words(targets, regex=config.layers is None)


def _in_their_words(patterns: Sequence[str], *, regex: bool) -> str | list[str] | None:
    """A list of names, or a single regular expression where `regex` allows one: a list cannot hold any, nor a glob."""
    names = [name for name in map(their_name, patterns) if name]
    if len(names) == len(patterns):
        return names
    alone = regex and len(patterns) == 1 and patterns[0].startswith("re:")
    return patterns[0].removeprefix("re:") if alone else None


def _covering_names(paths: list[str]) -> list[str]:
    """Return last names that stand for all linear layers; with several stacks of blocks, the last two names.

    In a model of several towers a last name such as `proj` may also be a convolution's; its parent tells them apart.
    """
    stacks = {re.split(r"\.\d+(?=\.)", path)[0] for path in paths if re.search(r"\.\d+\.", path)}
    kept = 1 if len(stacks) == 1 else 2
    names = {".".join(path.split(".")[-kept:]): path for path in paths}
    numbered = any(part.isdecimal() for name in names for part in name.split("."))
    return list(paths) if numbered else sorted(names)


def _our_parameters(fields: Mapping[str, Any], stacked: list[str]) -> list[str]:
    """Return our patterns for the stacked weights that PEFT's `target_parameters` mean."""
    said = names_in(fields)
    used = [name for name in said if any(ends(path, name) for path in stacked)]
    # a bare name would mean linear layers of that name too
    covers = all(any(ends(path, name) for name in used) for path in stacked)
    return [our_name(name) for name in (used if covers and all("." in name for name in used) else stacked)]


def their_parameters(targets: str | Iterable[str], stacked: list[str], *, limited: bool) -> list[str]:
    """Return PEFT's `target_parameters` for stacked weights: the configuration's own names where they mean just these.

    Args:
        limited: the configuration leaves something out, which PEFT's names of parameters cannot.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    names = [name for pattern in patterns if (name := their_name(pattern)) and any(ends(p, name) for p in stacked)]
    if patterns == ["all-linear"]:
        names = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in stacked))
    fits = not limited and all("." in name for name in names)
    return names if fits and all(any(ends(path, name) for name in names) for path in stacked) else stacked


def names_in(fields: Mapping[str, Any]) -> list[str]:
    """Return the names in `target_parameters`; anything but a list of strings is reported elsewhere."""
    said = fields.get("target_parameters")
    return [name for name in said if isinstance(name, str)] if isinstance(said, list | tuple | set) else []


def our_name(name: str) -> str:
    """Return the pattern of ours that means what a plain name means in PEFT."""
    special = name.startswith("re:") or name == "all-linear" or any(mark in name for mark in "*?[]!")
    return _SUFFIX + re.escape(name) if special else name


def their_name(pattern: str) -> str | None:
    """Return the plain name that a pattern of ours is, or None."""
    if pattern.startswith(_SUFFIX):
        escaped = pattern.removeprefix(_SUFFIX)
        name = re.sub(r"\\(.)", r"\1", escaped)
        return name if re.escape(name) == escaped else None
    return pattern if pattern != "all-linear" and is_name(pattern) else None


def our_patterns(patterns: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Return PEFT's pattern keys as patterns of ours that match the same modules, in the same order."""
    ours: dict[str, Any] = {}
    for key, value in patterns.items():
        regex = re.compile(rf"(.*\.)?({key})$")
        # PEFT's dot matches any character; where that makes no difference the plain name is kept.
        same = all(bool(regex.match(path)) == _listed([key], path) for path in paths)
        ours[key if _PLAIN.fullmatch(key) and same else f"{_SUFFIX}({key})"] = value
    return ours


def their_patterns(patterns: Mapping[str, Any], wanted: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return PEFT keys that give every module its value, in whatever order a reader sorts them."""
    said = {_pattern_key(key): plain_number(value) for key, value in patterns.items()}
    if _agree(said, wanted, default):
        return said
    special = {path: value for path, value in wanted.items() if value != default}
    by_name: dict[str, set[Any]] = {}
    for path, value in wanted.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    short = {
        name if len(by_name[name := path.rpartition(".")[2]]) == 1 else path: plain_number(value)
        for path, value in special.items()
    }
    if _agree(short, wanted, default):
        return short
    return {re.escape(path): plain_number(value) for path, value in special.items()}


def _agree(patterns: Mapping[str, Any], wanted: Mapping[str, Any], default: Any) -> bool:
    ordered = dict(sorted(patterns.items()))
    try:
        return all(their_value(order, p, default) == v for p, v in wanted.items() for order in (patterns, ordered))
    except re.error:
        return False


def _pattern_key(pattern: str) -> str:
    if pattern.startswith(f"{_SUFFIX}(") and pattern.endswith(")"):
        return pattern.removeprefix(f"{_SUFFIX}(").removesuffix(")")
    return pattern.removeprefix("re:")


def plain_number(value: Any) -> Any:
    """Return a whole number as an int, which is what PEFT's annotations promise."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
