"""What is kept of a finished training run: one small JSON file under its content key. No torch.

A study looks for a record before it starts a run, in its own folder and in the shared folder of
runs, so a finished run is never made again, and records can be committed without the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from growkit.core.errors import CheckpointError
from growkit.core.json_files import read_json_object
from growkit.core.names import CONFIG
from growkit.core.writing import write_whole
from growkit.training.checkpoints import list_checkpoints
from growkit.training.metrics import last_evaluation
from growkit.training.recipe import Recipe

RECORD = "record.json"
NODE = "node.json"
MODEL = "model"
FORMAT = 1
# Characters of each held-out document that the attention suite reads.
TEXT_OF_A_DOCUMENT = 50_000


@dataclass(frozen=True)
class Record:
    """One finished training run.

    Attributes:
        name: of the run when it was made; studies that share it may call it otherwise.
        change: what was done to the model before it, in words, or None.
        exactness: of that change, with what verification found, or None.
        parameters: of the model.
        flops_per_token: of training.
        steps, tokens: of this run alone.
        learning_rate: peak.
        seconds: spent on training steps.
        curve: (tokens of this run, held-out loss).
        measures, series: see :class:`growkit.study.results.Run`.
        machine: where it ran.
        date: when it ended, ISO 8601.
        diverged: why the run was given up, None for one that ended well.
    """

    key: str
    name: str
    change: str | None
    exactness: str | None
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    learning_rate: float
    seconds: float
    curve: list[tuple[int, float]]
    measures: dict[str, float]
    series: dict[str, list[tuple[float, float]]]
    machine: dict[str, Any]
    date: str
    held_out_tokens: int = 0
    diverged: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def first_loss(self) -> float:
        """Held out, before the first step."""
        return self.curve[0][1] if self.curve else float("nan")

    @property
    def last_loss(self) -> float:
        """Held out, after the last step; NaN where the run diverged."""
        return float("nan") if self.diverged or not self.curve else self.curve[-1][1]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}) + "\n")


def read_record(path: Path) -> Record | None:
    """The record in a file; None where there is none, or one of another format."""
    try:
        values = read_json_object(path, non_finite=True)
    except CheckpointError:
        return None
    if values.pop("format", None) != FORMAT:
        return None
    try:
        return TypeAdapter(Record).validate_python(values)  # lists become the pairs they stand for
    except ValidationError:
        return None


class Records:
    """Records by content key.

    Args:
        own: folder of the study's own copies.
        runs: folder of the runs, shared by studies.
        copied: records that another study made are copied to ``own``.
    """

    def __init__(self, own: Path, runs: Path, *, copied: bool = True) -> None:
        self.own, self.runs, self.copied = own, runs, copied
        self._known: dict[str, Record] = {}

    def get(self, key: str) -> Record | None:
        """The record of a run, or None."""
        if key not in self._known:
            record = read_record(self.own / f"{key}.json")
            if record is None:
                record = read_record(self.runs / key / RECORD)
                if record is not None and self.copied:
                    record.write(self.own / f"{key}.json")
            if record is None:
                return None
            self._known[key] = record
        return self._known[key]

    def trained(self, key: str) -> Path | None:
        """The folder of the trained model, if it is still there for a run to continue from."""
        folder = self.runs / key / MODEL
        return folder if can_go_on(folder) else None


def can_go_on(model: Path) -> bool:
    """Weights and optimizer state are there. Without the state a run would begin with a fresh one,
    and its result would not be that of its key."""
    return (model / CONFIG).is_file() and bool(list_checkpoints(model / "training" / "checkpoints"))


def not_finite(rows: Sequence[dict[str, Any]]) -> str | None:
    """Why a run has no result although its training losses are numbers."""
    return next(
        (
            f"The held-out loss is {row['eval_loss']} at step {row['step']}."
            for row in rows
            if not math.isfinite(row.get("eval_loss", 0.0))
        ),
        None,
    )


def curve(rows: Sequence[dict[str, Any]], before: int) -> list[tuple[int, float]]:
    """(tokens of this run, held-out loss); tokens count through all runs in the rows."""
    return [
        (row["tokens"] - before, row["eval_loss"])
        for row in rows
        if math.isfinite(row.get("eval_loss", math.nan))
    ]


def training_seconds(rows: Sequence[dict[str, Any]], before: int) -> float:
    """Time of the training steps alone, over all attempts."""
    seconds, at = 0.0, before
    for row in rows:
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - at) / max(row["tokens_per_second"], 1e-9)
            at = row["tokens"]
    return round(seconds, 2)


def series(
    rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """(tokens, value) of each probe; one with a value a layer is averaged over the layers."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        points = [
            (float(row["tokens"]), _mean(row["probe"][name]))
            for row in rows
            if row.get("probe", {}).get(name) is not None
        ]
        finite = [point for point in points if math.isfinite(point[1])]
        if finite:
            found[name] = finite
    return found


def _mean(value: Any) -> float:
    return sum(map(float, value)) / max(len(value), 1) if isinstance(value, list) else float(value)


def measures(
    model: Path, recipe: Recipe, rows: Sequence[dict[str, Any]], asked: Sequence[str]
) -> dict[str, float]:
    """Figures of the trained model besides its loss, ``loss.NAME`` of each source among them."""
    last = last_evaluation(rows) or {}
    by_source = {key: last[key] for key in last if key.startswith("eval_loss/")}
    found = {
        name: float(last[name])
        for name in ("perplexity", "bits_per_byte")
        if last.get(name) is not None
    }
    found |= {key.replace("eval_loss/", "loss."): float(by_source[key]) for key in by_source}
    if "attention" in asked:
        from growkit.evaluation import attention_suite
        from growkit.evaluation.model import load

        found |= attention_suite(load(model), text=held_out_text(recipe)).figures()
    return {name: value for name, value in found.items() if math.isfinite(value)}


def held_out_text(recipe: Recipe) -> str:
    """The beginnings of all held-out documents: what the model was not trained on."""
    from growkit.data.sources import corpus_of

    documents = corpus_of(recipe.data).eval_documents()
    return "\n\n".join(text[:TEXT_OF_A_DOCUMENT] for text in documents)
