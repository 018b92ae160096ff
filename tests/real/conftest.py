"""The real checkpoint, made once and kept in .cache/ of the repository."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from smollm2 import make_smollm2

CACHE = Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, float32, tied, GQA 9/3."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make_smollm2(CACHE / "smollm2-135m-instruct", CACHE / "smollm2-package")
