"""Checkpoints of a run that are whole or absent, and the choice of the one to resume from.

Layout of ``checkpoints/``::

    checkpoint-200/        model, optimizer, scheduler, RNG of every process, trainer state; and
        manifest.json      last of all {"format": 1, "step": 200, "processes": 2,
                           "strategy": "ddp", "files": {name: bytes}}
    .partial/              one that is being written; removed at the next start

A checkpoint is written under ``.partial``, fsynced, given its manifest, and renamed. A folder whose
files do not have the sizes of its manifest, or that lacks a part of the state, is damaged and is
never resumed from (transformers alone would resume from one without its optimizer file, with a
fresh optimizer, and say nothing).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from growkit.checkpoint.staging import sync, sync_tree
from growkit.errors import CheckpointError

PARTIAL = ".partial"
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def required_files(processes: int, strategy: str) -> list[str]:
    """What no checkpoint may lack, whatever else is in it."""
    ranks = range(processes)
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{r}.pth" for r in ranks]
    optimizer = "optimizer.pt" if strategy == "ddp" else "optimizer_0/.metadata"
    return ["config.json", optimizer, "scheduler.pt", "trainer_state.json", *states]


def publish(
    written: Path, target: Path, step: int, processes: int = 1, strategy: str = "ddp"
) -> None:
    """Give a finished checkpoint folder its manifest and its name; replaces an older one.

    Raises:
        CheckpointError: a part of it was not written.
    """
    files = _sizes(written)
    manifest = {
        "format": 1,
        "step": step,
        "processes": processes,
        "strategy": strategy,
        "files": files,
    }
    lacking = _lacks(manifest)
    if lacking is not None:
        raise CheckpointError(
            f"{target.name} was not published: {lacking} was not written.",
            "The run's folder must be on a file system that all processes share.",
        )
    (written / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    sync_tree(written)
    if target.exists():
        shutil.rmtree(target)
    os.rename(written, target)
    sync(target.parent)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest with every key, also of a checkpoint that was written before they existed."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    return {"processes": 1, "strategy": "ddp", **manifest}


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a published checkpoint."""
    return int(read_manifest(checkpoint)["processes"])


def _lacks(manifest: dict[str, Any]) -> str | None:
    files: dict[str, int] = manifest["files"]
    for name in required_files(manifest["processes"], manifest["strategy"]):
        if name not in files:
            return name
    return None if any(name.endswith(".safetensors") for name in files) else "model.safetensors"


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None when it is whole."""
    try:
        manifest = read_manifest(checkpoint)
        files, lacking = manifest["files"].items(), _lacks(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it has no readable manifest.json"
    if lacking is not None:
        return f"{lacking} was never in it"
    for name, size in files:
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
