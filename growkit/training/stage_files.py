"""The small files by which a staged run is steered. No torch here.

``stop.json`` of a stage says at which step it ends; it is written before anything depends on it.
``grow-now`` asks for a growth. The stage that ends for it takes the file to itself first, by a
rename, so that a run that is killed then neither forgets the wish nor grows twice for it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from growkit.checkpoint.staging import sync
from growkit.errors import UsageError
from growkit.training.published import published
from growkit.training.run_files import StageStop, read_file

STOP = "stop.json"
GROW_NOW = "grow-now"
TAKEN = "grow-now.taken"


def read_stop(folder: Path) -> int | None:
    """The step at which a stage was ended; None while it is not.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / STOP
    return read_file(path, StageStop).step if path.exists() else None


def take_request(request: Path, folder: Path) -> bool:
    """Whether a growth is asked for; a request is moved into the folder of the stage."""
    taken = folder / TAKEN
    with suppress(FileNotFoundError):
        os.replace(request, taken)
    return taken.exists()


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
    if published(out) is not None:
        raise UsageError(f"The run in {str(out)!r} is finished.", "Grow its folder: growkit grow.")
    (out / GROW_NOW).touch()
