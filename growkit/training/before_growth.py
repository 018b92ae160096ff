"""The held-out loss that a grown model has to beat: that of the model it was grown from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.errors import CheckpointError
from growkit.surgery.manifest import read_manifest
from growkit.surgery.trained_tokens import TRAINING_RECORD, read_training_record
from growkit.training.recipe import Recipe


def loss_before_growth(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> float | None:
    """Held-out loss of the parent in nats a token; None where the source is not freshly grown.

    A run of the parent beside the source that was measured on the same data section says it.
    Otherwise growth that keeps the function says it too: then it is the loss at the first step.

    Args:
        rows: the metrics of this run so far.
    """
    source = recipe.model.checkpoint
    manifest = read_manifest(source) if source is not None else None
    if source is None or manifest is None or (source / TRAINING_RECORD).exists():
        return None
    recorded = _recorded(
        source.resolve().parent / str((manifest.get("parent") or {}).get("name")), recipe
    )
    if recorded is not None:
        return recorded
    if (manifest.get("plan") or {}).get("exactness") == "not-exact":
        return None
    first = (row for row in rows if "eval_loss" in row and row["step"] == recipe.first_step)
    return next((row["eval_loss"] for row in first), None)


def _recorded(parent: Path, recipe: Recipe) -> float | None:
    try:
        record = read_training_record(parent) or {}
    except CheckpointError:
        return None
    same = (record.get("recipe") or {}).get("data") == recipe.to_dict()["data"]
    loss = record.get("eval_loss")
    return float(loss) if same and loss is not None else None
