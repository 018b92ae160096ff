"""Shared pieces of the training tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from process_runs import write_picture
from training_runs import write_text


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "king.txt")


@pytest.fixture(autouse=True)
def quick_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is a third of a tiny run's time; the runs of wider fixtures draw their picture."""
    monkeypatch.setattr("growkit.training.metrics.plot_losses", write_picture)
