"""When a stage ends: at its step, at a plateau of the loss, or by hand; decided once, by the first
of several processes.

The decision is written to ``stop.json`` of the stage before anything depends on it
(:func:`read_stop`), so a run that is killed afterwards ends the stage at the same step. Before
that, the same losses lead to the same decision again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from growkit.checkpoint.staging import sync
from growkit.core.errors import UsageError, VerificationFailed
from growkit.core.names import METRICS
from growkit.core.progress import Reporter
from growkit.core.records import read_record
from growkit.training.metrics import read_metrics
from growkit.training.parallel.processes import Processes
from growkit.training.published import published
from growkit.training.recipe_stages import Plateau, Trigger
from growkit.training.run_files import StageStop

FEWEST_POINTS = 3


def loss_slope(rows: Sequence[dict[str, Any]], window_tokens: int) -> float | None:
    """Least-squares slope of the training loss, in nats per million tokens, over the last window.

    None while there is less than a window of losses, or fewer than three.
    """
    points = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    if not points:
        return None
    last = points[-1][0]
    inside = [point for point in points if point[0] > last - window_tokens]
    if len(inside) == len(points) or len(inside) < FEWEST_POINTS:
        return None
    tokens, losses = np.array(inside, np.float64).T
    tokens -= tokens.mean()
    return float(tokens @ losses / (tokens @ tokens) * 1e6)


def on_plateau(rows: Sequence[dict[str, Any]], rule: Plateau) -> bool:
    """The loss falls by less than the rule wants."""
    slope = loss_slope(rows, rule.window_tokens)
    return slope is not None and -slope < rule.loss_per_million_tokens


class StageEnd(TrainerCallback):
    """Ends the run of a stage; stands before the callback that asks for a log line at a save.

    Args:
        trigger: of the growth that follows.
        folder: of the stage's run.
        request: a file whose existence asks for the growth now.
        processes: all end the stage at one step, whoever of them sees the files when.
    """

    def __init__(
        self, trigger: Trigger, folder: Path, request: Path, processes: Processes | None = None
    ) -> None:
        self.trigger, self.folder, self.request = trigger, folder, request
        self.processes = processes or Processes()
        self.metrics = folder / "training" / METRICS

    def _end(self, step: int, control: Any, why: str) -> Any:
        self.processes.from_first(lambda: write_stop(self.folder, step, why))
        control.should_save = control.should_training_stop = True
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        first = self.processes.first
        if self.processes.any(first and take_request(self.request, self.folder)):
            self._end(state.global_step, control, "by hand")
        return control


class PlateauEnd(StageEnd):
    """The same for losses; stands after the callback that writes them."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        return control

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        rule = self.trigger.plateau
        if rule is None or "loss" not in (given.get("logs") or {}):
            return control
        if control.should_training_stop:
            return control
        flat = self.processes.from_first(lambda: on_plateau(read_metrics(self.metrics), rule))
        if not flat:
            return control
        return self._end(state.global_step, control, "plateau")


class NoJump(TrainerCallback):
    """The held-out loss at the first step of a stage is that of the end of the stage before.

    Args:
        before: loss before the growth.
        reporter: told both losses.
        tolerance: of the difference, in nats per token; None where the function changes.
        stage: its number, for the error.
    """

    def __init__(
        self,
        before: float,
        tolerance: float | None,
        stage: int,
        first_step: int,
        reporter: Reporter,
    ) -> None:
        self.before, self.tolerance = before, tolerance
        self.stage, self.first_step, self.reporter = stage, first_step, reporter

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if state.global_step != self.first_step or not metrics:
            return
        after = metrics["eval_loss"]
        self.reporter.note(
            f"Held-out loss {self.before:.6f} before growth {self.stage}, {after:.6f} after it "
            f"({after - self.before:+.1e})."
        )
        if self.tolerance is None:
            return
        if not abs(after - self.before) <= self.tolerance:
            raise VerificationFailed(
                f"The held-out loss was {self.before:.6f} before growth {self.stage} and is "
                f"{after:.6f} after it.",
                f"Remove stages/{self.stage} and stages/{self.stage}-grown in the run's folder and "
                "repeat the command: it grows again from the checkpoint before.",
            )


STOP = "stop.json"
GROW_NOW = "grow-now"
TAKEN = "grow-now.taken"


def read_stop(folder: Path) -> int | None:
    """The step at which a stage was ended; None while it is not.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / STOP
    return read_record(path, StageStop).step if path.exists() else None


def take_request(request: Path, folder: Path) -> bool:
    """Whether a growth is asked for; a request is moved into the folder of the stage."""
    taken = folder / TAKEN
    with suppress(FileNotFoundError):
        os.replace(request, taken)
    return taken.exists()


def write_stop(folder: Path, step: int, why: str) -> None:
    """Decide, durably."""
    partial = folder / (STOP + ".partial")
    partial.write_text(json.dumps({"step": step, "why": why}) + "\n")
    sync(partial)
    os.replace(partial, folder / STOP)
    sync(folder)


def ask_for_growth(out: Path) -> None:
    """Ask the staged run in ``out`` to grow at the end of its next step.

    Raises:
        UsageError: there is no run with stages.
    """
    if not (out / "training" / "stages").is_dir():
        raise UsageError(
            f"{str(out)!r} holds no run with stages.",
            "Give the --out of a run whose recipe has a 'stages' section.",
        )
    if published(out) is not None:
        raise UsageError(f"The run in {str(out)!r} is finished.", "Grow its folder: growkit grow.")
    (out / GROW_NOW).touch()
