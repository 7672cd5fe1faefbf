"""targets: random trees and patterns against a slow reading of the documented language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from amounts import AMOUNTS, run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import TargetError
from sideroad.targets import resolve, select

NAMES = ("a", "b", "ab", "q_proj", "proj", "0", "1", "3", "10", "²", "é", "x y", "head", "layers")
SIGNS = ("a", "b", "q", "_", ".", "0", "1", "é", "*", "*", "?", "[ab]", "[!a]", "[a-q]", "[0-9]")


class Box(nn.Module):
    """A module that only holds others."""


trees = st.recursive(
    st.sampled_from(["linear", "linear", "norm"]),
    lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=4),
    max_leaves=9,
).filter(lambda tree: isinstance(tree, dict))


def module_of(tree: Any) -> nn.Module:
    if tree == "linear":
        return nn.Linear(3, 4)
    if tree == "norm":
        return nn.LayerNorm(3)
    box = Box()
    for name, inner in tree.items():
        box.add_module(name, module_of(inner))
    return box


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    model = module_of(draw(trees))
    inside = [path for path, _ in model.named_modules() if path]
    if draw(st.integers(0, 3)) == 0:
        model.add_module("shared", model.get_submodule(draw(st.sampled_from(inside))))
    return model


@st.composite
def patterns(draw: st.DrawFn, paths: list[str]) -> str:
    path = draw(st.sampled_from(paths))
    parts = path.split(".")
    suffix = ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])
    kind = draw(st.sampled_from(["suffix", "suffix", "glob", "glob", "regex", "part of a name", "any signs"]))
    if kind == "suffix":
        return suffix
    if kind == "glob":
        signs = draw(st.lists(st.sampled_from(["*", "?", "[ab]", ""]), min_size=len(path), max_size=len(path)))
        keep = draw(st.lists(st.integers(0, 4), min_size=len(path), max_size=len(path)))
        return "".join(letter if kept else sign for letter, sign, kept in zip(path, signs, keep, strict=True)) or "*"
    if kind == "regex":
        return "re:" + draw(st.sampled_from([".*" + re.escape(suffix), re.escape(path), ".*", "(a|b).*", r".*\.\d+"]))
    if kind == "part of a name":
        return suffix[draw(st.integers(0, len(suffix) - 1)) :]
    return "".join(draw(st.lists(st.sampled_from(SIGNS), min_size=1, max_size=5)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, AdapterConfig]:
    model = draw(models())
    some = patterns([path for path, _ in model.named_modules(remove_duplicate=False) if path]).filter(str.strip)
    blocks = st.sampled_from(["0", "0-1", "1-", "0,3", "10", " 0 - 3 ", (0,), (1, 3), (10,)])
    return model, AdapterConfig(
        targets=draw(st.just("all-linear") | some | st.lists(some | st.just("all-linear"), min_size=1, max_size=3)),
        exclude=draw(st.just(()) | st.lists(some, max_size=2).map(tuple)),
        layers=draw(st.none() | st.none() | blocks),
        layers_pattern=draw(st.none() | st.none() | st.sampled_from(["layers", "a"])),
        rank_pattern=draw(st.just({}) | st.dictionaries(some, st.integers(1, 3), max_size=2)),
        method=LoraMethod(rank=2),
    )


def means(pattern: str, path: str) -> bool:
    """The documented language, letter by letter."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    if not set(pattern) & set("*?["):
        parts, wanted = path.split("."), pattern.split(".")
        return parts[-len(wanted) :] == wanted
    return globbed(list(signs_of(pattern)), path)


def signs_of(glob: str) -> Iterator[str]:
    while glob:
        close = glob.find("]", 2)
        end = close + 1 if glob[0] == "[" and close > 0 else 1
        yield glob[:end]
        glob = glob[end:]


def globbed(signs: list[str], text: str) -> bool:
    if not signs:
        return not text
    first, rest = signs[0], signs[1:]
    if first == "*":
        return any(globbed(rest, text[taken:]) for taken in range(len(text) + 1))
    return bool(text) and one_of(first, text[0]) and globbed(rest, text[1:])


def one_of(sign: str, letter: str) -> bool:
    if sign == "?" or len(sign) == 1:
        return sign in ("?", letter)
    inner = sign[1:-1].removeprefix("!")
    low_high = re.fullmatch("(.)-(.)", inner)
    inside = low_high[1] <= letter <= low_high[2] if low_high else letter in inner
    return inside != sign.startswith("[!")


@dataclass
class Reading:
    """What a configuration means in a model, and words that the error must hold for each thing that is wrong."""

    chosen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def read(model: nn.Module, config: AdapterConfig) -> Reading:
    everything = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if path]
    first: dict[int, str] = {}
    for path, module in everything:
        first.setdefault(id(module), path)
    canonical = {path: first[id(module)] for path, module in everything}
    linear = [first[key] for key in first if isinstance(model.get_submodule(first[key]), nn.Linear)]
    found, chosen = Reading(), set()
    for pattern in [config.targets] if isinstance(config.targets, str) else config.targets:
        if pattern == "all-linear":
            chosen |= set(linear) - {"head"}
            found.wrong += [] if linear else ["no linear layer"]
            continue
        hits = [canonical[path] for path, _ in everything if means(pattern, path)]
        good = set(hits) & set(linear)
        name = not pattern.startswith("re:") and not set(pattern) & set("*?[")
        if not good or (name and set(hits) - good):
            found.wrong.append(f'target "{pattern}"')
        chosen |= good
    for pattern in config.exclude:
        hits = {canonical[path] for path, _ in everything if means(pattern, path)} & set(linear)
        found.wrong += [] if hits else [f'exclude "{pattern}"']
        chosen -= hits
    if config.layers is not None:
        index = {path: block_of(path, config.layers_pattern) for path in linear}
        present = {number for number in index.values() if number is not None}
        wanted = blocks_of(config.layers, max(present, default=0))
        found.wrong += [] if wanted <= present else ["layers asks for"]
        chosen = {path for path in chosen if index[path] in wanted}
    elif config.layers_pattern is not None:
        found.wrong.append("layers_pattern is set without layers")
    found.chosen = [path for path, _ in everything if path in chosen]
    if found.chosen:
        for pattern in config.rank_pattern:
            used = any(means(pattern, path) for path in found.chosen)
            found.wrong += [] if used else [f'rank_pattern "{pattern}"']
    elif not found.wrong:
        found.wrong.append("no layer")
    return found


def block_of(path: str, name: str | None) -> int | None:
    parts = path.split(".")
    numbers = [
        int(part)
        for before, part in pairwise(parts)
        if re.fullmatch("[0-9]+", part) and name in (None, before)
    ]
    return numbers[0] if numbers else None


def blocks_of(layers: str | tuple[int, ...], last: int) -> set[int]:
    if not isinstance(layers, str):
        return set(layers)
    wanted: set[int] = set()
    for piece in layers.replace(" ", "").split(","):
        low, dash, high = piece.partition("-")
        wanted |= set(range(int(low), int(high or (max(last, int(low)) if dash else low)) + 1))
    return wanted


@AMOUNTS
def test_targets_mean_what_the_language_says_and_no_miss_is_silent(amount: int) -> None:
    outcomes: set[bool] = set()

    @given(case=cases())
    def check(case: tuple[nn.Module, AdapterConfig]) -> None:
        model, config = case
        expected = read(model, config)
        assert sorted(select(model, config)) == sorted(expected.chosen)
        outcomes.add(bool(expected.wrong))
        if expected.wrong:
            with pytest.raises(TargetError) as caught:
                resolve(model, config)
            for words in expected.wrong:
                assert words in str(caught.value)
            return
        targets = resolve(model, config)
        assert list(targets) == expected.chosen
        for path, target in targets.items():
            ranks = [rank for pattern, rank in config.rank_pattern.items() if means(pattern, path)]
            assert (target.path, target.rank) == (path, [*ranks, 2][0])
            assert (target.out_features, target.in_features) == (4, 3)

    run(check, 250, amount)
    assert outcomes == {True, False}


@AMOUNTS
def test_no_pattern_text_raises_anything_but_a_target_error(amount: int) -> None:
    model = module_of({"a": {"0": "linear", "1": "norm"}, "b": "linear"})
    odd = st.text(st.sampled_from("ab01.*?[]!-^$\\(){}|+re:é\n,\0"), min_size=1, max_size=12) | st.text(min_size=1)

    either = st.builds(str.__add__, st.sampled_from(["", "re:"]), odd).filter(str.strip)

    @given(text=either, where=st.sampled_from(["targets", "exclude", "layers", "rank_pattern"]))
    def check(text: str, where: str) -> None:
        given_regex = text.startswith("re:") and where != "layers"
        if given_regex and re.search(r"\[\[|--|&&|\|\||~~", text):
            return  # Python warns about these
        value: Any = {text: 2} if where == "rank_pattern" else (text,) if where == "exclude" else text
        config = AdapterConfig(**{"targets": "*", "method": LoraMethod(rank=2), where: value})
        with suppress(TargetError):
            assert resolve(model, config)

    run(check, 250, amount)


@pytest.mark.parametrize("pattern", ["re:" + "(" * 5000 + ")" * 5000, "re:a{99999999999}", "re:(", "re:*"])
def test_regular_expressions_that_python_cannot_build_are_named(pattern: str) -> None:
    with pytest.raises(TargetError, match=r'pattern "re:.*" is not a regular expression'):
        resolve(module_of({"a": "linear"}), AdapterConfig(targets=pattern))


@pytest.mark.parametrize("layers", ["9" * 5000, "0-999999999", "²", "0-99999999999999999999"])
def test_blocks_that_no_model_has_are_named_at_once(layers: str) -> None:
    model = module_of({"layers": {"0": "linear"}})
    with pytest.raises(TargetError, match=r"is not a range; write 5, 0-3|means 1000000000 blocks; no model has that"):
        resolve(model, AdapterConfig(layers=layers))


def test_only_plain_digits_number_a_block() -> None:
    model = module_of({"layers": {"²": "linear", "0": "linear", "1": "linear"}})
    assert list(resolve(model, AdapterConfig(layers="1", method=LoraMethod(rank=2)))) == ["layers.1"]
