"""The folder of a run: made once, recognised as the same run later, and where to continue from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from growkit.checkpoint.side_files import RUN_FILES
from growkit.core.errors import CheckpointError, GrowkitError, UsageError
from growkit.core.files import open_lock
from growkit.core.names import METRICS, RECIPE, TRAINING_RECORD
from growkit.core.progress import Reporter
from growkit.core.records import read_record
from growkit.core.systems import lock_record
from growkit.core.writing import write_whole
from growkit.core.yaml_files import read_yaml
from growkit.training import checkpoints, metrics
from growkit.training.leftovers import remove
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe
from growkit.training.run_files import DataKey

# What may differ between a run and its continuation; anything else would be another run.
MAY_CHANGE = {
    "out",
    "data.cache_dir",
    "data.workers",
    "training.max_steps",
    "training.max_tokens",
    "training.logging_steps",
    "training.eval_steps",
    "training.probe_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.per_device_eval_batch_size",
    "training.dataloader_num_workers",
    "parallel.processes",
    "parallel.timeout_minutes",
    "position.end_step",
}
DATA = "data.json"
LOCK = ".lock"
BEGIN_ANEW = "Begin anew with --overwrite, or put the file back."


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
    stored = folder / "recipe.yaml"
    if not stored.is_file() or not _has_begun(folder):
        return "a new run"
    if overwrite:
        return "a new run; the one that is there is thrown away"
    _check_resumable(recipe, out, stored, resume, reporter)
    if resume == "auto":
        newest = resume_point(folder / "checkpoints", resume, reporter)
    else:
        newest = _chosen(resume)
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
    _check_same(recipe, stored, reporter)


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
    if stored.is_file() and overwrite:
        # The recipe last: a kill on the way leaves a folder that is known as a run. What a run does
        # not write stays.
        for path in [*folder.iterdir()]:
            if path.name in RUN_FILES or path.name.endswith(".partial"):
                remove(path)
        remove(out / TRAINING_RECORD)
    elif stored.is_file() and not _has_begun(folder):
        # It was refused or killed before its first step: a corrected recipe may have the folder.
        remove(folder / "tokenizer")
        remove(folder / DATA)
    elif stored.is_file():
        _check_resumable(recipe, out, stored, resume, reporter)
    remove(folder / "checkpoints" / checkpoints.PARTIAL)
    write_whole(stored, yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _has_begun(folder: Path) -> bool:
    rows = metrics.read_metrics(folder / METRICS)
    return bool(rows or checkpoints.list_checkpoints(folder / "checkpoints"))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for key in values for k, v in _flat(values[key], f"{prefix}{key}.").items()}
    return {prefix[:-1]: values}


def _check_same(recipe: Recipe, stored: Path, reporter: Reporter) -> None:
    values = read_yaml(stored, error=CheckpointError, remedy=BEGIN_ANEW)
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(stored)!r} holds no recipe.", BEGIN_ANEW)
    with suppress(UsageError):  # of another version: compared as it is
        values = make_recipe(values).to_dict()  # with keys that did not exist when it was stored
    old, new = _flat(values), _flat(recipe.to_dict())
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    forbidden = [key for key in changed if key not in MAY_CHANGE]
    if forbidden:
        key = forbidden[0]
        raise UsageError(
            f"{str(stored.parent.parent)!r} holds a run of another recipe: {key} was "
            f"{old.get(key)!r} and is {new.get(key)!r}"
            + (f" (and {len(forbidden) - 1} more)." if forbidden[1:] else "."),
            "Choose another --out, or begin anew with --overwrite.",
        )
    if {"training.max_steps", "training.max_tokens"} & set(changed):
        section = recipe.training
        if any(len(set(source.weights)) > 1 for source in recipe.data.sources):
            raise UsageError(
                "The length of the run changed, and the weights of its mixture change over it: "
                "the samples so far would have been others.",
                "Keep the length, or begin anew with --overwrite.",
            )
        if section.schedule == "cosine":
            reporter.warn(
                "the length of a cosine schedule changed: the learning rate jumps to the new curve"
            )


def check_data(folder: Path, key: str) -> None:
    """Refuse to continue with other data than the run began with."""
    path = folder / DATA
    if path.exists():
        if read_record(path, DataKey).packed != key:
            raise UsageError(
                f"The data files changed since the run in {str(folder.parent)!r} began.",
                "Put them back, choose another --out, or begin anew with --overwrite.",
            )
    else:
        write_whole(path, json.dumps({"packed": key}) + "\n")


def resume_point(folder: Path, resume: str, reporter: Reporter) -> Path | None:
    if resume == "never":
        return None
    if resume == "auto":
        newest, skipped = checkpoints.newest_whole(folder)
        for path, reason in skipped:
            reporter.warn(f"{path.name} is damaged ({reason}): skipped")
        if newest is not None:
            reporter.note(f"Going on from {newest.name}.")
        elif skipped:
            reporter.warn("no whole checkpoint is left: the run starts from the beginning")
        return newest
    chosen = _chosen(resume)
    # Newer checkpoints of this run belong to the branch that is left here.
    for newer in checkpoints.list_checkpoints(folder):
        if checkpoints.step_of(newer) > checkpoints.step_of(chosen):
            superseded = newer.with_name(newer.name + ".superseded")
            remove(superseded)
            newer.rename(superseded)
    return chosen


def _chosen(resume: str) -> Path:
    chosen = Path(resume).resolve()
    problem = checkpoints.damage(chosen) if chosen.is_dir() else "it is not a folder"
    if problem is None and checkpoints.step_of(chosen) < 0:
        problem = "its name is not checkpoint-N"
    if problem is not None:
        raise CheckpointError(
            f"{resume!r} cannot be resumed from: {problem}.",
            "Give a checkpoint-N folder that growkit train wrote, or --resume auto.",
        )
    return chosen
