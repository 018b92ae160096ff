"""Checkpoints of a run that are whole or absent, and the choice of the one to resume from.

Layout of ``checkpoints/``::

    checkpoint-200/        model, optimizer, scheduler, RNG of every process, trainer state; and
        manifest.json      last of all {"format": 2, "step": 200, "processes": 2,
                           "strategy": "ddp", "files": {name: bytes}, "xxh3": {name: digest}}
    .partial/              one that is being written; removed at the next start

A checkpoint is written under ``.partial``, fsynced, given its manifest, and renamed. A folder whose
files do not have the sizes and checksums of its manifest, that lacks a part of the state, or whose
state cannot be read, is damaged and is never resumed from (transformers alone would resume from one
without its optimizer file, with a fresh optimizer, and say nothing). Format 1 had no checksums.
"""

from __future__ import annotations

import os
from pathlib import Path

from growkit.checkpoint.staging import sync, sync_tree
from growkit.core.errors import CheckpointError
from growkit.core.names import CONFIG, OPTIMIZER, SCHEDULER, SINGLE_FILE, TRAINER_STATE
from growkit.core.records import read_record
from growkit.training.checksums import checksums
from growkit.training.leftovers import remove
from growkit.training.run_files import CheckpointManifest, random_states, step_of

PARTIAL = ".partial"
MANIFEST = "manifest.json"


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def required_files(processes: int, strategy: str) -> list[str]:
    """What no checkpoint may lack, whatever else is in it."""
    optimizer = OPTIMIZER if strategy == "ddp" else "optimizer_0/.metadata"
    states = random_states(processes)
    return [CONFIG, optimizer, SCHEDULER, TRAINER_STATE, *states]


def publish(
    written: Path, target: Path, step: int, processes: int = 1, strategy: str = "ddp"
) -> None:
    """Give a finished checkpoint folder its manifest and its name; replaces an older one.

    Raises:
        CheckpointError: a part of it was not written.
    """
    files = _sizes(written)
    manifest = CheckpointManifest(
        format=2,
        step=step,
        processes=processes,
        strategy="ddp" if strategy == "ddp" else "fsdp",
        files=files,
        xxh3=checksums(written, files),
    )
    lacking = _lacks(manifest)
    if lacking is not None:
        raise CheckpointError(
            f"{target.name} was not published: {lacking} was not written.",
            "The run's folder must be on a file system that all processes share.",
        )
    (written / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    sync_tree(written)
    remove(target)
    os.rename(written, target)
    sync(target.parent)


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest, also of a checkpoint that was written before all of its keys existed.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return read_record(checkpoint / MANIFEST, CheckpointManifest)


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a published checkpoint."""
    return read_manifest(checkpoint).processes


def _lacks(manifest: CheckpointManifest) -> str | None:
    files = manifest.files
    if manifest.processes > len(files):  # one file of random numbers each
        return f"the state of process {len(files)}"
    for name in required_files(manifest.processes, manifest.strategy):
        if name not in files:
            return name
    if manifest.format > 1 and manifest.xxh3.keys() != files.keys():
        return "a checksum"
    return None if any(name.endswith(".safetensors") for name in files) else SINGLE_FILE


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed from, or None when it is whole.

    Args:
        contents: read the files and compare checksums; otherwise sizes only (fast, no torch).
    """
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:
        return "it has no readable manifest.json"
    lacking = _lacks(manifest)
    if lacking is not None:
        return f"{lacking} was never in it"
    for name, size in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return _damaged_content(checkpoint, manifest) if contents else None


def _damaged_content(checkpoint: Path, manifest: CheckpointManifest) -> str | None:
    from growkit.training.checkpoint_state import unreadable

    try:
        for name, digest in checksums(checkpoint, manifest.xxh3).items():
            if digest != manifest.xxh3[name]:
                return f"{name} has other bytes than were written"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return unreadable(checkpoint, manifest)


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def newest_whole(
    folder: Path, *, contents: bool = True
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest undamaged checkpoint, and the newer ones that were skipped, with the reason.

    Args:
        contents: see :func:`damage`.
    """
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = damage(checkpoint, contents=contents)
        if reason is None:
            return checkpoint, skipped
        skipped.append((checkpoint, reason))
    return None, skipped


def keep_newest(folder: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``."""
    if limit is not None:
        for checkpoint in list_checkpoints(folder)[:-limit]:
            remove(checkpoint)
