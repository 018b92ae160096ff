"""What a run came to: the record in growkit_training.json and the answer of ``train``."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growkit.core.names import METRICS


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to. Losses in nats per token; None without held-out text."""

    out: Path
    steps: int
    tokens: int
    parameters: int
    loss: float | None
    eval_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    seconds: float
    resumed_from: str | None
    metrics: Path
    plot: Path | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def make_result(
    record: dict[str, Any], out: Path, folder: Path, started: float, resumed_from: str | None
) -> TrainingResult:
    plot = folder / "loss.png"
    names = ("steps", "tokens", "parameters", "loss", "eval_loss", "perplexity", "bits_per_byte")
    return TrainingResult(
        out=out,
        **{name: record[name] for name in names},
        seconds=round(time.monotonic() - started, 2),
        resumed_from=resumed_from,
        metrics=folder / METRICS,
        plot=plot if plot.is_file() else None,
    )
