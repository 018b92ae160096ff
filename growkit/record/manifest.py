# SPDX-License-Identifier: Apache-2.0
"""growkit.json: what a grown folder records of itself, written and read.

What growkit_training.json has to hold for its readers. Imports pydantic.

What growkit.json has to hold for its readers. Imports pydantic: imported where a file exists.

growkit.json: where a grown folder comes from, how it was made, what in it is new.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from growkit import __version__
from growkit.checkpoint import Checkpoint, identity
from growkit.checkpoint.hub import origin
from growkit.core.errors import CheckpointError
from growkit.core.json_files import read_json_object
from growkit.core.names import MANIFEST, TRAINING_RECORD
from growkit.core.records import Record
from growkit.record.new_parameters import abbreviated, new_parameters, written_out
from growkit.record.plan_report import plan_report
from growkit.surgery.plan import Plan


class TrainingRecord(Record):
    """The record of a finished run; older versions wrote fewer keys."""

    steps: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    stages: int | None = None
    parameters: int | None = None
    held_out_tokens: int | None = None
    eval_loss: float | None = None
    loss_before_growth: float | None = None
    recipe: dict[str, Any] | None = None


Range = list[int]
Parts = dict[str, list[Range]]


class ParentRecord(Record):
    """Who the source was."""

    name: str | None = None
    revision: str | None = None


class CostRecord(Record):
    """Figures of one model."""

    parameters: int | None = None


class PlanRecord(Record):
    """What a growth did."""

    exactness: str | None = None
    before: CostRecord | None = None
    after: CostRecord | None = None


class VerificationRecord(Record):
    """What the verification said."""

    summary: str | None = None


class ManifestRecord(Record):
    """The whole file."""

    format: int = 1
    parent: ParentRecord | None = None
    request: dict[str, Any] | None = None
    plan: PlanRecord | None = None
    new_parameters: dict[str, Literal["all"] | Parts] | None = None
    verification: VerificationRecord | None = None
    lineage: list[Any] = Field(default_factory=list)


FORMAT = 2  # 2: new_parameters abbreviated, see growkit.record.new_parameters
REMEDY = "Copy the file from where the folder was grown, or remove it to continue without."


def read_manifest(folder: Path, *, tolerant: bool = False) -> dict[str, Any] | None:
    """The manifest of a folder, or None when it has none; ``new_parameters`` are written out.

    Args:
        tolerant: a damaged manifest is none; for what can be told without it.

    Raises:
        CheckpointError: it cannot be read, or a key holds what it cannot; the key is named.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        content = read_json_object(path, non_finite=True, remedy=REMEDY)
        return expanded(content, str(path))
    except CheckpointError:
        if tolerant:
            return None
        raise


def expanded(content: dict[str, Any], file: str) -> dict[str, Any]:
    """The manifest that a growkit.json of any format says.

    Raises:
        CheckpointError: a key holds what it cannot, or a later growkit wrote it.
    """
    from growkit.core.records import checked

    record = checked(ManifestRecord, content, file, remedy=REMEDY)
    if record.format > FORMAT:
        raise CheckpointError(
            f"{file!r} has format {record.format}, and this growkit reads up to {FORMAT}.",
            "Update growkit.",
        )
    new = content.get("new_parameters")
    if new is None:
        return content
    return content | {"new_parameters": written_out(new, file, REMEDY)}


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


def manifest_text(manifest: dict[str, Any]) -> str:
    """The content of growkit.json: ``new_parameters`` abbreviated, lists of numbers on one line."""
    short = manifest | {"new_parameters": abbreviated(manifest["new_parameters"])}
    text = json.dumps(short, indent=2, ensure_ascii=False) + "\n"
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text)


# A string of JSON has no line break of its own, so only lists are found.
_NUMBERS = re.compile(r"(?<=\[)\n\s*-?\d+(?:,\n\s*-?\d+)*\n\s*(?=\])")


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
