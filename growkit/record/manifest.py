"""growkit.json: where a grown folder comes from, how it was made, what in it is new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from growkit import __version__
from growkit.checkpoint import Checkpoint, identity
from growkit.checkpoint.hub import origin
from growkit.core.errors import CheckpointError
from growkit.core.json_files import read_json_object
from growkit.record.plan_report import plan_report
from growkit.surgery.dim_map import DimMap
from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import TensorPlan

MANIFEST = "growkit.json"
FORMAT = 1
REMEDY = "Copy the file from where the folder was grown, or remove it to continue without."


def read_manifest(folder: Path, *, tolerant: bool = False) -> dict[str, Any] | None:
    """The manifest of a folder, or None when it has none.

    Args:
        tolerant: a damaged manifest is none; for what can be told without it.

    Raises:
        CheckpointError: it cannot be read, or a key holds what it cannot; the key is named.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    from growkit.core.records import checked
    from growkit.record.manifest_record import ManifestRecord

    try:
        content = read_json_object(path, non_finite=True, remedy=REMEDY)
        checked(ManifestRecord, content, str(path), remedy=REMEDY)
    except CheckpointError:
        if tolerant:
            return None
        raise
    return content


def parent_identity(checkpoint: Checkpoint, content_sha256: str | None) -> dict[str, Any]:
    """Who the source was: folder name (or Hub id and commit), hash of config and headers, content
    hash if asked for, and the tokens that it was trained on where its folder says so."""
    name, commit = origin(checkpoint.path)
    tokens = trained_tokens(checkpoint.path)
    return {
        "name": name,
        **({"revision": commit} if commit else {}),
        **({} if tokens is None else {"trained_tokens": tokens}),
        **identity(checkpoint),
        "content_sha256": content_sha256,
    }


def build_manifest(
    plan: Plan, request: dict[str, Any], content_sha256: str | None = None
) -> dict[str, Any]:
    """The manifest of a grown folder, without verification figures.

    Keys: ``format``, ``growkit_version``, ``parent``, ``request`` (the recipe's ``grow`` section),
    ``plan`` (see :func:`plan_report`), ``new_parameters`` (see :func:`new_parameters`),
    ``verification`` (None until verified) and ``lineage`` (earlier growths, oldest first).
    """
    before = read_manifest(plan.checkpoint.path, tolerant=True)
    lineage = []
    if before is not None:
        lineage = [*before.get("lineage", []), _lineage_entry(before)]
    return {
        "format": FORMAT,
        "growkit_version": __version__,
        "parent": parent_identity(plan.checkpoint, content_sha256),
        "request": request,
        "plan": plan_report(plan),
        "new_parameters": new_parameters(plan),
        "verification": None,
        "lineage": lineage,
    }


def _lineage_entry(manifest: dict[str, Any]) -> dict[str, Any]:
    plan = manifest.get("plan", {})
    return {
        "parent": manifest.get("parent"),
        "request": manifest.get("request"),
        "growkit_version": manifest.get("growkit_version"),
        "axes": plan.get("axes"),
        "exactness": plan.get("exactness"),
    }


def config_block(manifest: dict[str, Any]) -> dict[str, Any]:
    """The small ``growkit`` block of config.json; it survives ``save_pretrained``."""
    return {
        "version": manifest["growkit_version"],
        "parent": manifest["parent"]["name"],
        "parent_config_sha256": manifest["parent"]["config_sha256"],
        "grown": manifest["request"],
        "exactness": manifest["plan"]["exactness"],
        "growths": len(manifest["lineage"]) + 1,
    }


def to_json(value: Any) -> str:
    """JSON as we write it to files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


TRAINING_RECORD = "growkit_training.json"


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
    from growkit.record.training_record import TrainingRecord

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


def new_parameters(plan: Plan, tensors: Iterable[TensorPlan] | None = None) -> dict[str, Any]:
    """Map from written tensor to what in it has no old counterpart; ``tensors``: of these alone.

    The value is ``"all"`` for a tensor of an inserted layer, of a further copy of an expert, or one
    without a source; otherwise an object with ``rows`` and/or ``columns`` (and ``experts`` of a
    stack [experts, rows, columns]): lists of [start, end) element ranges that hold further copies
    or new units (the first copy of a unit counts as the old one). Tensors without new parts are
    absent. Names are those on disk: transformers stacks the experts of a layer when it loads them.
    """
    result: dict[str, Any] = {}
    known: dict[tuple[DimMap | None, ...], dict[str, Any]] = {}
    for tensor in plan.tensors if tensors is None else tensors:
        part = _new_part(plan, tensor, known)
        if part:
            result[tensor.output.name] = part
    return result


def _new_part(
    plan: Plan, tensor: TensorPlan, ranges: dict[tuple[DimMap | None, ...], dict[str, Any]]
) -> Any:
    """``ranges`` are those of the maps met before: tensors with the same maps share one entry."""
    if tensor.computed is not None:
        # Made of old weights, or a tensor that the source's attention has not.
        known = plan.source_family.tensor(tensor.role)
        return {} if known is not None and known.when(plan.source_sizes) else "all"
    if tensor.redrawn and tensor.expert is not None:
        return "all"  # a mixture of old and new: none of the experts is the old FFN
    if tensor.source is None or tensor.expert_copy or tensor.action in ("zero", "closed"):
        return "all"
    if tensor.in_new_layer:
        return "all"
    if tensor.dims not in ranges:
        ranges[tensor.dims] = {
            label: [list(r) for r in dim.new_ranges]
            for label, dim in zip(tensor.dim_labels, tensor.dims, strict=True)
            if dim is not None and dim.new_ranges
        }
    return ranges[tensor.dims]
