"""The figures below the progress bar of a training run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from growkit.training.growth.grown import loss_before_growth
from growkit.training.metrics import read_metrics
from growkit.training.recipe import Recipe


def log_line(recipe: Recipe, row: dict[str, Any]) -> str:
    """A line of metrics.jsonl for a log that people read."""
    at = f"step {row['step']:,} of {recipe.end_step:,}: "
    if "eval_loss" in row:
        return f"{at}held-out loss {_loss(row['eval_loss'])}"
    return (
        f"{at}loss {_loss(row['loss'])}, learning rate {row['learning_rate']:.2e}, "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )


class LiveFigures:
    """What a run is at, as label -> text; the last known value of each.

    Args:
        metrics: where a resumed run finds the loss that it has to beat.
    """

    def __init__(self, recipe: Recipe, metrics: Path) -> None:
        self.recipe, self.metrics = recipe, metrics
        self.to_beat: float | None = None
        self._figures: dict[str, str] = {}

    def after(self, row: dict[str, Any]) -> dict[str, str]:
        """The figures once a line of metrics.jsonl is known."""
        if self.to_beat is None:
            rows = [*read_metrics(self.metrics), row]
            self.to_beat = loss_before_growth(self.recipe, rows)
        if "loss" in row:
            self._figures |= {
                "loss": _loss(row["loss"]),
                "learning rate": f"{row['learning_rate']:.2e}",
                "speed": f"{row['tokens_per_second']:,.0f} tokens/s",
            }
        if "router_aux_loss" in row:
            self._figures["router loss"] = f"{row['router_aux_loss']:.3f}"
        if "eval_loss" in row:
            self._figures["held-out"] = _loss(row["eval_loss"])
            if self.to_beat is not None:
                below = self.to_beat - row["eval_loss"]
                beaten = f"beaten by {below:.3f}" if below > 0 else f"{-below:.3f} to go"
                self._figures["before growth"] = f"{self.to_beat:.3f}, {beaten}"
        return self._figures


def _loss(value: float) -> str:
    return f"{value:.3f} (perplexity {math.exp(min(value, 700.0)):,.1f})"
