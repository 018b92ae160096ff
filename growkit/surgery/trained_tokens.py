"""How many tokens a checkpoint has been trained on, where its folder says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
