"""A small model and its folder, for the tests of this room that compare others with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import verify_models as models


@pytest.fixture(scope="module")
def model() -> Any:
    return models.make_model()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(model, tmp_path_factory.mktemp("source") / "a")
