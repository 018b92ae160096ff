"""Tests of several rooms share the tiny checkpoints of ``tiny_checkpoints.py`` and a real one."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here pulls the plug, and waiting for the disk is most of a tiny growth's time. Tests of
# durability put their own in its place.
os.fsync = lambda descriptor: None

# What the tests derive is no table of the user's.
_user_cache = tempfile.TemporaryDirectory(prefix="growkit-tests-")
os.environ["XDG_CACHE_HOME"] = _user_cache.name

CACHE = Path(__file__).parents[1] / ".cache"


_modules = 0  # that were imported when memory was last looked through


def pytest_collection_finish() -> None:
    """The trainer collects garbage in every run: torch and thousands of tests are none."""
    _freeze()


def pytest_runtest_teardown() -> None:
    """Nor are modules that a test imported."""
    if len(sys.modules) > _modules + 100:
        gc.collect()
        _freeze()


def _freeze() -> None:
    global _modules
    _modules = len(sys.modules)
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, float32, tied, GQA 9/3; made once and kept in .cache/."""
    from real.smollm2 import make_smollm2

    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make_smollm2(CACHE / "smollm2-135m-instruct", CACHE / "smollm2-package")
