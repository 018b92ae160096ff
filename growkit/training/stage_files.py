"""The two small files by which a staged run is steered. No torch here."""

from __future__ import annotations

import json
import os
from pathlib import Path

from growkit.checkpoint.staging import sync
from growkit.errors import UsageError
from growkit.training.run_folder import DONE

STOP = "stop.json"
GROW_NOW = "grow-now"


def read_stop(folder: Path) -> int | None:
    """The step at which a stage was ended."""
    try:
        return int(json.loads((folder / STOP).read_text())["step"])
    except FileNotFoundError:
        return None


def write_stop(folder: Path, step: int, why: str) -> None:
    """Decide, durably."""
    partial = folder / (STOP + ".partial")
    partial.write_text(json.dumps({"step": step, "why": why}) + "\n")
    sync(partial)
    os.replace(partial, folder / STOP)
    sync(folder)


def ask_for_growth(out: Path) -> None:
    """Ask the staged run in ``out`` to grow at the end of its next step.

    Raises:
        UsageError: there is no run with stages.
    """
    if not (out / "training" / "stages").is_dir():
        raise UsageError(
            f"{str(out)!r} holds no run with stages.",
            "Give the --out of a run whose recipe has a 'stages' section.",
        )
    if (out / DONE).is_file():
        raise UsageError(f"The run in {str(out)!r} is finished.", "Grow its folder: growkit grow.")
    (out / GROW_NOW).touch()
