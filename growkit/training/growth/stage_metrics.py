"""metrics.jsonl and loss.png of a whole staged run, from those of its stages.

Every line has its ``stage``. Between two stages stands a line of the growth: ``step``, ``tokens``,
``stage`` (the one that begins), ``growth`` (the request), ``parameters_before``, ``parameters``,
``loss_before`` and ``loss_after`` (held out, in nats per token).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from growkit.core.names import METRICS
from growkit.core.progress import Reporter
from growkit.core.writing import write_whole
from growkit.record.manifest import read_manifest
from growkit.training import metrics
from growkit.training.published import published


def stage_folder(stages: Path, stage: int) -> Path:
    """The run of a stage."""
    return stages / str(stage)


def grown_folder(stages: Path, stage: int) -> Path:
    """The grown checkpoint that a stage starts from."""
    return stages / f"{stage}-grown"


def record_of(stages: Path, stage: int) -> dict[str, Any] | None:
    """The record of a finished stage."""
    return published(stage_folder(stages, stage))


def _rows(stages: Path, stage: int) -> list[dict[str, Any]]:
    return metrics.read_metrics(stage_folder(stages, stage) / "training" / METRICS)


def write_merged(path: Path, stages: Path, growths: int) -> None:
    """Write the lines of all stages, with the growths between them."""
    lines: list[dict[str, Any]] = []
    for stage in range(growths + 1):
        rows = _rows(stages, stage)
        if stage and rows:
            lines.append(_growth_row(stages, stage, rows))
        lines += [{**row, "stage": stage} for row in rows]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def _growth_row(stages: Path, stage: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    before = record_of(stages, stage - 1) or {}
    manifest = read_manifest(grown_folder(stages, stage)) or {}
    return {
        "step": before.get("steps"),
        "tokens": before.get("tokens"),
        "stage": stage,
        "growth": manifest.get("request"),
        "parameters_before": before.get("parameters"),
        "parameters": manifest.get("plan", {}).get("after", {}).get("parameters"),
        "loss_before": before.get("eval_loss"),
        "loss_after": next((row["eval_loss"] for row in rows if "eval_loss" in row), None),
    }


def plot(folder: Path, stages: Path, growths: int, title: str, reporter: Reporter) -> bool:
    """Draw loss.png; False where it could not be drawn."""
    curves: list[metrics.Curve] = [
        (f"stage {stage}", rows, 0)
        for stage in range(growths + 1)
        if (rows := _rows(stages, stage))
    ]
    marks = [
        (row["tokens"], f"growth {row['stage']}")
        for row in metrics.read_metrics(folder / METRICS)
        if "growth" in row
    ]
    return metrics.draw_losses(curves, folder / "loss.png", reporter, title=title, marks=marks)
