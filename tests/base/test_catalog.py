"""The list of named models."""

from __future__ import annotations

import pytest

from sideroad.base.catalog import CATALOG, NamedModel


@pytest.mark.parametrize("model", CATALOG.values(), ids=CATALOG)
def test_catalogue_entries_are_complete(model: NamedModel) -> None:
    assert len(model.wheel_sha256) == len(model.weights_sha256) == 64
    assert model.licence == "apache-2.0"
    assert model.config()["architectures"]
    assert model.source == f"{model.package} {model.version}"
