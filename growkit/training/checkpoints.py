"""Checkpoints of a run that are whole or absent, and the choice of the one to resume from.

Layout of ``checkpoints/``::

    checkpoint-200/        model, optimizer, scheduler, RNG and trainer state, and last of all
        manifest.json      {"format": 1, "step": 200, "files": {name: bytes}}
    .partial/              one that is being written; removed at the next start

A checkpoint is written under ``.partial``, fsynced, given its manifest, and renamed. A folder whose
files do not have the sizes of its manifest is damaged and is never resumed from (transformers alone
would resume from one without its optimizer file, with a fresh optimizer, and say nothing).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from growkit.checkpoint.staging import sync, sync_tree

PARTIAL = ".partial"
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def publish(written: Path, target: Path, step: int) -> None:
    """Give a finished checkpoint folder its manifest and its name; replaces an older one."""
    manifest = {"format": 1, "step": step, "files": _sizes(written)}
    (written / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    sync_tree(written)
    if target.exists():
        shutil.rmtree(target)
    os.rename(written, target)
    sync(target.parent)


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None when it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest.json"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 for another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest undamaged checkpoint, and the newer ones that were skipped, with the reason."""
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped.append((checkpoint, reason))
    return None, skipped


def keep_newest(folder: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``."""
    if limit is not None:
        for checkpoint in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(checkpoint)
