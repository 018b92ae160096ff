"""The folder of a run: made once, recognised as the same run later, and where to continue from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from growkit.checkpoint.side_files import RUN_FILES
from growkit.core.errors import GrowkitError, UsageError
from growkit.core.files import open_lock
from growkit.core.names import METRICS, RECIPE, TRAINING_RECORD
from growkit.core.progress import Reporter
from growkit.core.systems import lock_record
from growkit.core.writing import write_whole
from growkit.training import checkpoints, metrics
from growkit.training.change_point import (
    change_of,
    check_repeated,
    chosen_checkpoint,
    elsewhere,
    stored_change,
    write_change,
)
from growkit.training.changes import check_same
from growkit.training.data_position import DATA
from growkit.training.leftovers import remove
from growkit.training.recipe import Recipe

LOCK = ".lock"


def check_source(recipe: Recipe, out: Path) -> None:
    source = recipe.model.checkpoint
    if source is None:
        return
    if not source.is_dir():
        raise UsageError(
            f"model.checkpoint {str(source)!r} is not a folder.",
            "Give the path of a checkpoint folder; paths are relative to the current folder.",
        )
    if source.resolve() == out:
        raise UsageError(
            f"The output {str(out)!r} is the checkpoint that the run starts from.",
            "Choose another --out; to continue with an interrupted run, repeat its own command.",
        )


@contextmanager
def open_run(
    recipe: Recipe, out: Path, folder: Path, resume: str, overwrite: bool, reporter: Reporter
) -> Iterator[None]:
    """Make the run folder, or check that the run in it is this one; hold it until the end.

    Raises:
        UsageError: the folder holds something else.
        GrowkitError: another process is training into it.
    """
    _check_place(out, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / LOCK) as lock:
        _lock(lock.fileno(), out)
        _prepare(recipe, out, folder, resume, overwrite, reporter)
        yield


def look_into(recipe: Recipe, out: Path, resume: str, overwrite: bool, reporter: Reporter) -> str:
    """What a run would do with ``out``, in words; nothing is written.

    Raises:
        UsageError: the folder holds something else, as :func:`open_run` says.
    """
    folder = out / "training"
    _check_place(out, folder)
    stored = folder / RECIPE
    if overwrite or not stored.is_file() or not _has_begun(folder):
        point = change_of(recipe, folder, resume)
        new = "a new run" if point is None else f"goes on from {point.checkpoint}"
        return f"{new}; the one that is there is thrown away" if overwrite and out.exists() else new
    _check_resumable(recipe, out, stored, resume, reporter)
    if resume == "auto" or elsewhere(resume, folder):
        newest = resume_point(folder / "checkpoints", "auto", reporter)
    else:
        newest = chosen_checkpoint(resume)
    return "the run there begins again" if newest is None else f"continues from {newest.name}"


def _check_place(out: Path, folder: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"The output {str(out)!r} is a file.", "Choose a folder with --out.")
    if not (folder / RECIPE).is_file() and _is_in_use(out, folder):
        raise UsageError(
            f"The output {str(out)!r} is not empty and holds no training run.",
            "Choose another --out.",
        )


def _check_resumable(
    recipe: Recipe, out: Path, stored: Path, resume: str, reporter: Reporter
) -> None:
    if resume == "never":
        raise UsageError(
            f"{str(out)!r} holds a run already.",
            "Choose another --out, continue with --resume auto, or begin anew: --overwrite.",
        )
    check_repeated(stored.parent, resume, out)
    own = "auto" if elsewhere(resume, stored.parent) else resume
    point = stored_change(stored.parent)
    check_same(recipe, stored, own, reporter, begin=0 if point is None else point.step)


def _is_in_use(out: Path, folder: Path) -> bool:
    # A run that was killed before its recipe had its name leaves these.
    ours = {folder, folder / LOCK, folder / "recipe.yaml.partial"}
    return any(
        path not in ours for place in (out, folder) if place.is_dir() for path in place.iterdir()
    )


def _lock(descriptor: int, out: Path) -> None:
    """Two launches that know nothing of each other must not write the same run.

    A record lock, unlike flock, is not inherited by data loading workers, which outlive a killed
    run by some seconds.
    """
    if not lock_record(descriptor):
        raise GrowkitError(
            f"Another process is training into {str(out)!r} now.",
            "Wait for it or choose another --out; for one run in several processes, start them "
            "with torchrun.",
        )


def _prepare(
    recipe: Recipe, out: Path, folder: Path, resume: str, overwrite: bool, reporter: Reporter
) -> None:
    stored = folder / RECIPE
    begun = stored.is_file() and _has_begun(folder) and not overwrite
    change = None if begun else change_of(recipe, folder, resume)
    if stored.is_file() and overwrite:
        # The recipe last: a kill on the way leaves a folder that is known as a run. What a run does
        # not write stays.
        for path in [*folder.iterdir()]:
            if path.name in RUN_FILES or path.name.endswith(".partial"):
                remove(path)
        remove(out / TRAINING_RECORD)
    elif begun:
        _check_resumable(recipe, out, stored, resume, reporter)
    elif stored.is_file():
        # It was refused or killed before its first step: a corrected recipe may have the folder.
        for name in ("tokenizer", DATA, METRICS):
            remove(folder / name)
    remove(folder / "checkpoints" / checkpoints.PARTIAL)
    write_change(folder, change)
    write_whole(stored, yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _has_begun(folder: Path) -> bool:
    point = stored_change(folder)
    first = -1 if point is None else point.step  # the lines up to there are of the run before
    rows = [row for row in metrics.read_metrics(folder / METRICS) if row["step"] > first]
    return bool(rows or checkpoints.list_checkpoints(folder / "checkpoints"))


def resume_point(folder: Path, resume: str, reporter: Reporter) -> Path | None:
    """The checkpoint to continue from, of this run or of the one that it goes on from.

    Args:
        folder: of the run's checkpoints.
    """
    if resume == "never":
        return None
    if resume == "auto" or elsewhere(resume, folder.parent):
        newest, skipped = checkpoints.newest_whole(folder)
        for path, reason in skipped:
            reporter.warn(f"{path.name} is damaged ({reason}): skipped")
        point = stored_change(folder.parent)
        if newest is not None:
            reporter.note(f"Going on from {newest.name}.")
        elif point is not None:
            newest = chosen_checkpoint(point.checkpoint)
        elif skipped:
            reporter.warn("no whole checkpoint is left: the run starts from the beginning")
        return newest
    chosen = chosen_checkpoint(resume)
    # Newer checkpoints of this run belong to the branch that is left here.
    for newer in checkpoints.list_checkpoints(folder):
        if checkpoints.step_of(newer) > checkpoints.step_of(chosen):
            superseded = newer.with_name(newer.name + ".superseded")
            remove(superseded)
            newer.rename(superseded)
    return chosen
