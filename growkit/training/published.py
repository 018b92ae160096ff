"""The one place that decides whether a run, or a stage of one, is finished: by what is on disk.

A final model is moved into its folder file by file, ``config.json`` after the weights (a folder
without it does not load) and ``growkit_training.json`` last of all. So that record says that
everything else is in place; it is believed only beside a config and weights of the right sizes.
Whatever is missing, the repeated command publishes again, from the last checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from growkit.checkpoint import open_checkpoint
from growkit.checkpoint.staging import sync, sync_tree
from growkit.core.errors import GrowkitError
from growkit.core.names import CONFIG, TRAINING_RECORD
from growkit.core.records import read_record
from growkit.training.adapters import check_adapter, has_adapter
from growkit.training.leftovers import remove
from growkit.training.run_files import RunRecord


def move_into(staging: Path, out: Path) -> None:
    """Make a finished model durable and move it into ``out``.

    A kill leaves the older model, none, or the new one, never a mixture that loads, and never the
    record of a run without its model.
    """
    sync_tree(staging)
    for name in (TRAINING_RECORD, CONFIG):
        remove(out / name)
    for stale in [*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json")]:
        remove(stale)
    last = [name for name in (CONFIG, TRAINING_RECORD) if (staging / name).is_file()]
    for name in sorted(path.name for path in staging.iterdir() if path.name not in last):
        _move(staging / name, out / name)
    sync(out)
    for name in last:
        _move(staging / name, out / name)
        sync(out)
    staging.rmdir()


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        remove(target)
    os.replace(source, target)


def published(out: Path) -> dict[str, Any] | None:
    """The record of the run whose whole model lies in ``out``; None where there is none."""
    try:
        record = read_record(out / TRAINING_RECORD, RunRecord)
        if has_adapter(out) and not (out / CONFIG).is_file():
            check_adapter(out)
            return record.model_dump()
        with open_checkpoint(out):  # a config, and every weight file as long as its header says
            return record.model_dump()
    except (GrowkitError, OSError):
        return None
