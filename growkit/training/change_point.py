"""A run that goes on from a checkpoint of another one with another rate, schedule or more data.

``growkit train RECIPE --resume CHECKPOINT --out NEW``: step, weights, optimizer state, random
numbers and place in the data are the checkpoint's, and the run in NEW counts on from there. What it
took up and what changed stands in ``NEW/training/change_point.json``, so that the same command goes
on from NEW's own checkpoints once it has any; ``metrics.jsonl`` begins with the lines up to the
checkpoint, and one with the key ``change``. No torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError, UsageError
from growkit.core.names import METRICS, RECIPE
from growkit.core.progress import Reporter
from growkit.core.records import read_record
from growkit.core.writing import write_whole
from growkit.training import checkpoints, metrics
from growkit.training.changes import CHANGE_POINT, MAY_CHANGE, Changes, weights_command
from growkit.training.recipe import Recipe
from growkit.training.run_files import RunFile

CHANGE_FILE = "change_point.json"


class ChangePoint(RunFile):
    """``change_point.json``.

    Attributes:
        checkpoint: that the run goes on from.
        step: of the whole run.
        changed: dotted key of the recipe -> [before, after].
    """

    checkpoint: str
    step: int
    changed: dict[str, list[Any]]

    @property
    def run(self) -> Path:
        """``OUT/training`` of the run that wrote the checkpoint."""
        return Path(self.checkpoint).parents[1]


def stored_change(folder: Path) -> ChangePoint | None:
    """The change point that the run in ``OUT/training`` begins at, if it does."""
    path = folder / CHANGE_FILE
    return read_record(path, ChangePoint) if path.is_file() else None


def elsewhere(resume: str, folder: Path) -> Path | None:
    """The checkpoint of another run that ``--resume`` names; None for one of this run's own."""
    if resume in ("auto", "never"):
        return None
    place = Path(resume).resolve()
    return None if place.parent == (folder / "checkpoints").resolve() else place


def change_of(recipe: Recipe, folder: Path, resume: str) -> ChangePoint | None:
    """What a run that has not begun takes up and changes; None where it goes on from nothing.

    Args:
        folder: of the run, ``OUT/training``.

    Raises:
        UsageError: a key changed that a change point keeps.
        CheckpointError: the checkpoint is damaged or none.
    """
    source = elsewhere(resume, folder)
    if source is None:
        stored = stored_change(folder)
        if stored is None or resume == "never":
            return None
        source = Path(stored.checkpoint)
    source = chosen_checkpoint(str(source))
    stored_recipe = source.parents[1] / RECIPE
    if not stored_recipe.is_file():
        raise UsageError(
            f"{str(source)!r} does not lie in the folder of its run: what changed cannot be told.",
            f"Start from its weights: {weights_command(recipe, source, folder.parent)}",
        )
    changes = Changes.since(stored_recipe, recipe)
    kept = [
        key
        for key in changes.values
        if key not in MAY_CHANGE | changes.same_samples and not CHANGE_POINT.fullmatch(key)
    ]
    if kept:
        old, new = changes.values[kept[0]]
        raise UsageError(
            f"A change point keeps {kept[0]}, which was {old!r} and is {new!r}.",
            "Set it back, or start from the weights, which keeps the place in the data where it "
            f"can: {weights_command(recipe, source, folder.parent)}",
        )
    said = {key: list(pair) for key, pair in changes.values.items() if key not in MAY_CHANGE}
    return ChangePoint(checkpoint=str(source), step=checkpoints.step_of(source), changed=said)


def chosen_checkpoint(resume: str) -> Path:
    """The checkpoint that ``--resume`` names, whole.

    Raises:
        CheckpointError: it is damaged, or none of growkit's.
    """
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


def check_repeated(folder: Path, resume: str, out: Path) -> None:
    """Refuse to continue a run with the checkpoint of another one that it does not go on from."""
    source, stored = elsewhere(resume, folder), stored_change(folder)
    if source is not None and (stored is None or Path(stored.checkpoint) != source):
        raise UsageError(
            f"{str(out)!r} holds a run that does not go on from {resume!r}.",
            "Choose another --out, continue with --resume auto, or begin anew: --overwrite.",
        )


def take_up(point: ChangePoint, recipe: Recipe, folder: Path, reporter: Reporter) -> None:
    """Say what is picked up, and begin the metrics with those of the run before."""
    samples = point.step * recipe.sequences_per_step
    words = Changes(None, recipe, {k: (v[0], v[1]) for k, v in point.changed.items()})
    reporter.note(
        f"Picked up from {point.checkpoint}: step {point.step}, weights, optimizer state and "
        f"random numbers; the data go on behind {samples:,} samples. Changed: "
        f"{words.in_words(point.changed) or 'nothing'}."
    )
    target = folder / METRICS
    if target.is_file():
        return
    rows = metrics.read_metrics(point.run / METRICS)
    rows = [r for r in rows if r["step"] <= point.step and "averaged_checkpoints" not in r]
    tokens = point.step * recipe.tokens_per_step
    change = {"change": point.changed, "checkpoint": point.checkpoint}
    metrics.write_metrics(target, [*rows, {"step": point.step, "tokens": tokens, **change}])


def changes_in(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The change points of a run, oldest first, as its record holds them."""
    return [
        {key: row[key] for key in ("step", "checkpoint", "change") if key in row}
        for row in rows
        if "change" in row
    ]


def write_change(folder: Path, point: ChangePoint | None) -> None:
    """Store it before the first step; whole, or not there."""
    if point is None:
        return
    write_whole(folder / CHANGE_FILE, json.dumps(point.model_dump(), indent=2) + "\n")
