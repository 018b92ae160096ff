"""growkit.json: where a grown folder comes from, how it was made, what in it is new, its proof."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from growkit import __version__
from growkit.checkpoint import Checkpoint, identity
from growkit.checkpoint.hub import origin
from growkit.core.json_files import read_json_object
from growkit.errors import CheckpointError
from growkit.surgery.new_parameters import new_parameters
from growkit.surgery.plan import Plan
from growkit.surgery.report import plan_report
from growkit.surgery.trained_tokens import trained_tokens

MANIFEST = "growkit.json"
FORMAT = 1
REMEDY = "Copy the file from where the folder was grown, or remove it to go on without."


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
    from growkit.surgery.manifest_record import ManifestRecord

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
