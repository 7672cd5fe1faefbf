"""How many examples a property gets: few by default, many under the `all` marker; the same ones every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

MANY = 10
"""Times as many examples in `make test-all`."""

AMOUNTS = pytest.mark.parametrize("amount", [1, pytest.param(MANY, marks=pytest.mark.all)], ids=["few", "many"])


def run(check: Callable[[], None], few: int, amount: int) -> None:
    """Run a `given` function with `few` times `amount` examples."""
    settings(max_examples=few * amount, suppress_health_check=[HealthCheck.too_slow])(check)()
