"""Any JSON in any field of an adapter's files: an error that helps, or exactly the right tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from amounts import AMOUNTS, run
from damaged import CONFIG, EXPECTED, MANIFEST, WEIGHTS, Damage, assert_right_or_told, load_with, raw, rubbish
from hypothesis import given
from hypothesis import strategies as st

from sideroad.config import AdapterConfig

pytestmark = pytest.mark.usefixtures("no_pickles")


def nested(depth: int, sign: str = "[]") -> str:
    return ("[" * depth + "]" * depth) if sign == "[]" else ('{"a":' * depth + "1" + "}" * depth)


@pytest.mark.parametrize("sign", ["[]", "{}"])
@pytest.mark.parametrize("depth", [90, 101, 500, 900, *range(930, 1010, 6), 100_000])
def test_json_nested_to_any_depth(single: Path, depth: int, sign: str) -> None:
    bomb = nested(depth, sign)
    for name in (CONFIG, MANIFEST):
        text = (single / name).read_text().rstrip().removesuffix("}")
        for key in ("novel", "r", "target_modules", "config", "base"):
            assert_right_or_told(single, {name: f'{text}, "{key}x": {bomb}}}'.encode()})
        found = load_with(single, {name: f'{{"config": {bomb}, "base": {bomb}, "peft_type": {bomb}}}'.encode()})
        assert isinstance(found, str)
    for header in (bomb, f'{{"a": {bomb}}}', f'{{"a": {{"dtype": "F32", "shape": {bomb}, "data_offsets": {bomb}}}}}'):
        assert isinstance(load_with(single, {WEIGHTS: raw(header.encode())}), str)


JSON_FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_type", "task_type", "lora_dropout", "use_rslora",
    "base_model_name_or_path", "use_dora", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "enable_lora", "novelty", "base", "config", "a" * 3000,
)  # fmt: skip
EXACT_FIELDS = tuple(AdapterConfig.model_fields)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 2, 1.5, 1e308, 10**300, 10**400, "", " ", "x", "x" * 25_000, "(", "(" * 3000,
    "(" * 3000 + ")" * 3000, "a{99999999999}", "half \ud800", "*", "re:(", "all-linear", "0-99999999", [], [[]], {},
    [{}], [None], [1, 5], [1, 1], [10**300], ["x" * 50] * 500, ["half \ud800"], ["score"], ["m.score", "x" * 25_000],
    ["re:("], {"(": 2}, {"v_proj": 10**400}, {"v_proj": 1e308}, {"x" * 25_000: 2}, {"embed": [1, 5]},
    {"embed": [1, 10**400]}, {"x": [1]}, {"qkv": [True, True]}, {"q": [[-3, True], [6, True]]}, {"*": [True]},
    {"q": [[2**63, True], [3 - 2**63, True]]}, {"qkv": [[0, True], [6, True]]}, {"conv": [True, True]}, {"(": [True]},
    {"re:(": [True]}, {"tok": [[4, True]]}, {"qkv": [[6, True], [0, True]]}, {"targets": ["re:("]},
    {"name": "x" * 25_000}, [True], [True, True], [True, False, True], [False, True] * 40,
)  # fmt: skip


def with_field(home: Path, field: str, value: Any) -> Iterator[Damage]:
    """The directory with another value in a field of either file, or of the configuration in sideroad.json."""
    for name in (CONFIG, MANIFEST):
        if (home / name).exists() and field in JSON_FIELDS:
            fields = json.loads((home / name).read_text())
            yield {name: json.dumps({**fields, field: value}).encode()}
    if field in EXACT_FIELDS:
        exact = EXPECTED[home].config.model_dump(mode="json")
        yield {MANIFEST: json.dumps({"config": {**exact, field: value}}).encode()}


@pytest.mark.parametrize("field", dict.fromkeys([*JSON_FIELDS, *EXACT_FIELDS]), ids=lambda field: field[:20])
@AMOUNTS
def test_each_odd_value_in_each_field(single: Path, rich: Path, field: str, amount: int) -> None:
    for home in (rich, single)[:amount]:
        for value in ODD:
            for damage in with_field(home, field, value):
                assert_right_or_told(home, damage)


@AMOUNTS
def test_any_json_in_any_fields(single: Path, rich: Path, amount: int) -> None:
    @given(
        home=st.sampled_from([single, rich]),
        name=st.sampled_from([CONFIG, MANIFEST]),
        changes=st.dictionaries(st.sampled_from(JSON_FIELDS), rubbish | st.sampled_from(ODD), min_size=1, max_size=3),
    )
    def check(home: Path, name: str, changes: dict[str, Any]) -> None:
        fields = json.loads((home / name).read_text())
        assert_right_or_told(home, {name: json.dumps({**fields, **changes}).encode()})

    run(check, 100, amount)
