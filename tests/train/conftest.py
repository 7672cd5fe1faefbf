"""Fixtures of the training tests."""

from __future__ import annotations

import pytest

from sideroad.train import finish


@pytest.fixture
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a run its picture, which takes longer than the training."""
    monkeypatch.setattr(finish, "loss_plot", lambda records, title: b"")
