"""Training runs as a report sees them: their lines, and which one continues from which."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growkit.checkpoint import open_checkpoint
from growkit.core.errors import CheckpointError, GrowkitError, UsageError
from growkit.core.files import output_path
from growkit.core.names import CONFIG, METRICS, RECIPE
from growkit.core.yaml_files import read_yaml
from growkit.families import family_of
from growkit.record.cost import training_flops_of
from growkit.record.manifest import (
    TRAINING_RECORD,
    read_manifest,
    read_training_record,
    trained_tokens,
)
from growkit.training.checkpoints import list_checkpoints, newest_whole
from growkit.training.metrics import read_metrics

MAX_LENGTH = 2**40
REMEDY = "Give output folders of growkit train, as it wrote them."


@dataclass(frozen=True)
class Run:
    """One output folder of ``growkit train``.

    Attributes:
        source: the folder that the run started from, or None.
        grown: that folder came out of a growth and had not been trained since.
        rows: the lines of metrics.jsonl.
        record: growkit_training.json; empty while the run is not finished.
        flops_per_token: of a training step; None for an architecture without family.
        parent: the run among those of the report that this one continues from.
        tokens_before, flops_before: spent before its first step.
    """

    name: str
    folder: Path
    source: Path | None
    grown: bool
    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    flops_per_token: float | None
    parent: str | None = None
    tokens_before: int = 0
    flops_before: float = 0.0

    @property
    def first_tokens(self) -> int:
        """What its lines begin to count at: a stage counts on from the stage before it."""
        return min(row["tokens"] for row in self.rows) if self.recipe.get("position") else 0

    @property
    def tokens(self) -> int:
        """Tokens of this run so far."""
        return max(row["tokens"] for row in self.rows) - self.first_tokens

    @property
    def loss_before_growth(self) -> float | None:
        """Held-out loss that a grown run has to beat."""
        loss = self.record.get("loss_before_growth")
        return None if loss is None else float(loss)

    def series(self, key: str, *, probe: bool = False) -> tuple[list[int], list[Any]]:
        """(tokens, values) of a key of the lines, or of their probes; tokens over all growths."""
        found = [
            (row["tokens"] - self.first_tokens + self.tokens_before, part[key])
            for row in self.rows
            for part in [row.get("probe", {}) if probe else row]
            if part.get(key) is not None
        ]
        return [tokens for tokens, _ in found], [value for _, value in found]

    def flops(self, tokens: Sequence[int]) -> list[float]:
        """FLOPs over all growths after so many tokens."""
        per_token = self.flops_per_token or 0.0
        return [self.flops_before + (t - self.tokens_before) * per_token for t in tokens]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the order in which they were named, each after what it continues from.

    Raises:
        UsageError: a folder holds no training run, or is named twice.
    """
    paths = [path for folder in folders for path in _stages(output_path(folder))]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"The run {str(twice)!r} is named twice.", "Name every run once.")
    names = [path.name for path in paths]
    return _placed([_read(path, _name(path, names.count(path.name) > 1)) for path in paths])


def _stages(folder: Path) -> list[Path]:
    """The runs of a folder: its stages where it was grown while it was trained, or itself."""
    stages = folder / "training" / "stages"
    numbers = sorted(
        int(path.name) for path in stages.glob("*") if re.fullmatch("[0-9]{1,9}", path.name)
    )
    begun = [stages / str(number) for number in numbers]
    return [path for path in begun if read_metrics(path / "training" / METRICS)] or [folder]


def _name(folder: Path, ambiguous: bool) -> str:
    if folder.parent.name == "stages":
        return f"{folder.parents[2].name}, stage {folder.name}"
    return f"{folder.parent.name}/{folder.name}" if ambiguous else folder.name


def _read(folder: Path, name: str) -> Run:
    metrics, stored = folder / "training" / METRICS, folder / "training" / RECIPE
    rows = read_metrics(metrics)
    if not rows or not stored.is_file():
        raise UsageError(
            f"{str(folder)!r} holds no training run with metrics.",
            "Give output folders of growkit train: they hold training/metrics.jsonl.",
        )
    recipe = _recipe(stored)
    checkpoint = (recipe.get("model") or {}).get("checkpoint")
    source = Path(checkpoint).resolve() if checkpoint else None
    if source is not None and not source.exists() and (folder.parent / source.name).exists():
        source = folder.parent / source.name  # the report is made in another folder than the run
    return Run(
        name=name,
        folder=folder,
        source=source,
        grown=source is not None
        and read_manifest(source) is not None
        and not (source / TRAINING_RECORD).exists(),
        recipe=recipe,
        rows=rows,
        record=read_training_record(folder) or {},
        flops_per_token=_flops_per_token(folder, source, recipe),
    )


def _recipe(stored: Path) -> dict[str, Any]:
    """The recipe of a run, the sections that a report reads checked."""
    recipe = read_yaml(stored, error=CheckpointError, remedy=REMEDY)
    data = recipe.get("data") if isinstance(recipe, dict) else None
    model = (recipe.get("model") or {}) if isinstance(recipe, dict) else None
    length = data.get("sequence_length", 512) if isinstance(data, dict) else None
    start = model.get("checkpoint") if isinstance(model, dict) else None
    if (
        not isinstance(model, dict)
        or not isinstance(start, str | None)
        or not isinstance(length, int)
        or not 0 < length <= MAX_LENGTH
    ):
        raise CheckpointError(f"{str(stored)!r} is not the recipe of a training run.", REMEDY)
    return recipe


def _flops_per_token(folder: Path, source: Path | None, recipe: dict[str, Any]) -> float | None:
    """FLOPs of a training step per token, at the sequence length."""
    newest = newest_whole(folder / "training" / "checkpoints", contents=False)[0]
    places = [place for place in (folder, newest, source) if place is not None]
    place = next((place for place in places if (place / CONFIG).is_file()), None)
    if place is None:
        return None
    try:
        with open_checkpoint(place) as checkpoint:
            family = family_of(checkpoint.config, checkpoint.tensors)
            sizes = family.sizes_of(checkpoint.config, checkpoint.tensors)
    except GrowkitError:
        return None
    length = recipe["data"].get("sequence_length", 512)
    return training_flops_of(family, sizes, length)


def _parent(run: Run, runs: Sequence[Run]) -> tuple[Run, int] | None:
    """The run that this one starts from, and the tokens of that run that it continues: by its
    folder or one of its checkpoints, directly or through a growth, wherever the grown folder lies
    (growkit.json knows its parent by config and tokens)."""
    if run.source is None:
        return None
    candidates = [run.source]
    if run.folder.parent.name == "stages":
        candidates.append(run.folder.parent / str(int(run.folder.name) - 1))
    manifest = (read_manifest(run.source) or {}) if run.grown else {}
    recorded = manifest.get("parent") or {}
    if run.grown:
        candidates.append(run.source.parent / str(recorded.get("name")))
    others = [other for other in runs if other is not run]
    for path in candidates:
        for other in others:
            if path in (other.folder, *_checkpoints(other)):
                return other, _tokens_at(other, path)
    for other in others if recorded else ():
        for path in (other.folder, *_checkpoints(other)):
            if _is_recorded(path, recorded):
                return other, _tokens_at(other, path)
    return None


def _checkpoints(run: Run) -> list[Path]:
    return list_checkpoints(run.folder / "training" / "checkpoints")[::-1]


def _is_recorded(folder: Path, recorded: Mapping[str, Any]) -> bool:
    """The folder has the config and the tokens of a growth's recorded parent."""
    config = folder / CONFIG
    if not config.is_file() or folder.name != recorded.get("name"):
        return False
    same = hashlib.sha256(config.read_bytes()).hexdigest() == recorded.get("config_sha256")
    return same and trained_tokens(folder) == recorded.get("trained_tokens")


def _tokens_at(run: Run, path: Path) -> int:
    """Tokens of the run at a checkpoint of it; all of them in its own folder."""
    step = re.fullmatch(r"checkpoint-([0-9]{1,12})", path.name) if path != run.folder else None
    if step is None:
        return run.tokens
    until = [row["tokens"] for row in run.rows if row.get("step", 0) <= int(step[1])]
    return max(until, default=run.first_tokens) - run.first_tokens


def _placed(runs: list[Run]) -> list[Run]:
    """The runs with their parents' tokens and FLOPs behind them."""
    done: dict[Path, Run] = {}

    def place(run: Run) -> Run:
        if run.folder not in done:
            found = _parent(run, runs)
            if found is not None:
                parent, tokens = found
                before = place(parent)
                flops = before.flops_before + tokens * (before.flops_per_token or 0.0)
                run = replace(
                    run,
                    parent=before.name,
                    tokens_before=before.tokens_before + tokens,
                    flops_before=flops,
                )
            elif run.source is not None:
                run = replace(run, tokens_before=trained_tokens(run.source) or 0)
            done[run.folder] = run
        return done[run.folder]

    return [place(run) for run in runs]
