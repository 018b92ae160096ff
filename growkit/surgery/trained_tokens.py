"""How many tokens a checkpoint has been trained on, where its folder says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from growkit.core.json_files import read_json_object
from growkit.errors import CheckpointError

TRAINING_RECORD = "growkit_training.json"
MANIFEST = "growkit.json"


def trained_tokens(folder: Path) -> int | None:
    """Tokens of all training that led to a folder, over growths; None where that is not recorded.

    A trained folder's own record counts (``trained_tokens``); a grown folder has seen what its
    parent had (``parent.trained_tokens`` of growkit.json).
    """
    record = _read(folder / TRAINING_RECORD)
    if record:
        return _whole(record.get("trained_tokens"))
    parent = _read(folder / MANIFEST).get("parent")
    return _whole(parent.get("trained_tokens")) if isinstance(parent, dict) else None


def read_training_record(folder: Path) -> dict[str, Any] | None:
    """growkit_training.json of a folder, or None when it has none.

    Raises:
        CheckpointError: it cannot be read, or a key holds what it cannot; the key is named.
    """
    path = folder / TRAINING_RECORD
    if not os.path.lexists(path):
        return None
    from growkit.core.records import checked
    from growkit.surgery.training_record import TrainingRecord

    content = read_json_object(path, non_finite=True)
    checked(TrainingRecord, content, str(path))
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, non_finite=True)
    except CheckpointError:
        return {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
