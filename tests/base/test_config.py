"""The base section of a recipe."""

from __future__ import annotations

import pytest

from sideroad.base.config import BaseConfig
from sideroad.config import validate
from sideroad.errors import ConfigError


def test_a_base_needs_only_a_model() -> None:
    config = BaseConfig(model="smollm2-135m-instruct")
    assert (config.revision, config.quantize, config.dtype, config.device) == (None, None, "auto", "auto")


def test_every_wrong_value_is_reported_at_once() -> None:
    values = {"model": " ", "modle": "x", "quantize": "nf4", "device": "gpu", "dtype": "half"}
    with pytest.raises(ConfigError) as caught:
        validate(BaseConfig, values, "recipe.yaml")
    message = str(caught.value)
    assert 'unknown key "modle". Did you mean "model"?' in message
    assert "the model is empty" in message
    assert "quantised bases are not supported; use null" in message
    assert "a device is auto, cpu, mps, cuda or cuda:N" in message
    assert "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'" in message


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:11"])
def test_devices_by_name(device: str) -> None:
    assert BaseConfig(model="x", device=device).device == device


def test_a_name_that_does_not_exist() -> None:
    import sideroad.base

    with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
        sideroad.base.nothing  # noqa: B018
