from __future__ import annotations

import pytest

from sideroad.config import validate
from sideroad.data.config import DataConfig
from sideroad.errors import ConfigError


def test_defaults() -> None:
    config = DataConfig(train="a.jsonl")
    assert (config.format, config.max_length, config.packing, config.overlong) == ("auto", 512, "auto", "auto")
    assert config.train_sources == ("a.jsonl",)
    assert DataConfig(train=["a", "b"]).train_sources == ("a", "b")


def test_every_key_is_documented() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "train: Field required"),
        ({"train": " "}, "a source is empty"),
        ({"train": []}, "a source is empty"),
        ({"train": "a", "max_lenght": 9}, 'Did you mean "max_length"?'),
        ({"train": "a", "packing": "yes"}, "'auto', 'on' or 'off'"),
        ({"train": "a", "max_length": 1}, "greater than or equal to 8"),
        ({"train": "a", "limit": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_values(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(DataConfig, values, "recipe.yaml")
    assert words in str(caught.value)
