"""scaling: two rules, and the patterns that change their numbers."""

from __future__ import annotations

import pytest

from sideroad.config import AdapterConfig, LoraMethod
from sideroad.scaling import scale


def test_rules() -> None:
    assert scale(AdapterConfig(method=LoraMethod(alpha=16)), "q_proj", 8) == 2.0
    rooted = AdapterConfig(method=LoraMethod(alpha=16, scaling="alpha/sqrt(r)"))
    assert scale(rooted, "q_proj", 64) == 2.0


def test_first_matching_alpha_counts() -> None:
    config = AdapterConfig(alpha_pattern={"layers.1.q_proj": 3.0, "q_proj": 5.0, "re:.*v.*": 7.0})
    found = [scale(config, path, 1) for path in ("layers.1.q_proj", "layers.0.q_proj", "v_proj", "o_proj")]
    assert found == pytest.approx([3.0, 5.0, 7.0, 16.0])
