"""metrics.jsonl: one JSON object a line, and loss.png drawn from it.

Keys of a training line: step, tokens, loss, learning_rate, grad_norm, tokens_per_second, and mfu
where the device's peak is known (growkit.training.at_evaluation); of a grown
model also grad_norm_old and grad_norm_new, over old and over new slots. Norms are those of the last
step, before clipping; a frozen slot's gradient counts as zero. Of a model with experts also
router_aux_loss, without its coefficient and in no loss (growkit.training.router_loss).
Keys of an evaluation line: step, tokens, eval_loss, perplexity, bits_per_byte; where the weights
are a mean of checkpoints, averaged_checkpoints says of how many.
Of a mixture also eval_loss/NAME of each source; where the recipe asks for them, samples (a list of
prompt and text) and eval_task/TASK/METRIC. A line with the key change says where the run went
on with other rates or data (growkit.training.change_point); with the key probe: growth/probes.py.
Losses are in nats per token; a training loss is the mean over the steps since the line before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.core.errors import CheckpointError
from growkit.core.files import read_bytes
from growkit.core.json_files import parse_json_object
from growkit.core.printed_text import literal_text
from growkit.core.progress import Reporter
from growkit.core.records import checked
from growkit.core.writing import write_whole
from growkit.training.run_files import MetricsLine

MOST_BYTES = 1 << 30


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines.

    The last one may be cut off when a run was killed; it, and a line that is damaged, is left out.
    """
    if not path.is_file():
        return []
    content = read_bytes(path, limit=MOST_BYTES)
    return [row for line in content.splitlines() if (row := _row(line, path)) is not None]


def _row(line: bytes, path: Path) -> dict[str, Any] | None:
    try:
        values = parse_json_object(line, path.name, non_finite=True)
        checked(MetricsLine, values, str(path))
    except CheckpointError:
        return None
    return values


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what was logged after ``step``: a resumed run logs those steps again.

    An evaluation of averaged weights comes after the last step.
    """
    rows = [
        row
        for row in read_metrics(path)
        if row["step"] <= step and "averaged_checkpoints" not in row
    ]
    write_metrics(path, rows)


def write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All lines at once."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def last_evaluation(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluation line."""
    return next((row for row in reversed(rows) if "eval_loss" in row), None)


Curve = tuple[str, Sequence[dict[str, Any]], int]


def plot_losses(
    curves: Sequence[Curve],
    target: Path,
    *,
    title: str,
    marks: Sequence[tuple[int, str]] = (),
    unit: str = "tokens",
) -> bool:
    """Draw training and held-out loss against tokens.

    Args:
        curves: (label, metrics rows, tokens that came before the run).
        marks: (tokens, label) of vertical lines, for example where the model was grown.
        unit: what the rows have under ``tokens``.

    Returns:
        False when matplotlib is not installed (nothing is written then).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, rows, before) in enumerate(curves):
        # Curves that lie on each other must both be seen: each later one is dashed more.
        color, style = f"C{number}", ("-", "-", "--", ":")[number % 4]
        train = [(before + row["tokens"], row["loss"]) for row in rows if "loss" in row]
        held_out = [
            (before + row["tokens"], row["eval_loss"]) for row in rows if "eval_loss" in row
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.35, linewidth=1)
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True),
                color=color,
                linestyle=style,
                marker="o",
                markersize=3,
                label=label,
            )
        elif train:
            axes.plot([], [], color=color, alpha=0.35, label=label)
    for tokens, label in marks:
        axes.axvline(tokens, color="0.4", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{title}\nheld-out: dots; training: pale line", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    partial = target.with_name(target.name + ".partial")
    literal_text(figure)
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, target)
    return True


def draw_losses(
    curves: Sequence[Curve],
    target: Path,
    reporter: Reporter,
    *,
    title: str,
    marks: Sequence[tuple[int, str]] = (),
    unit: str = "tokens",
) -> bool:
    """:func:`plot_losses` for a run: a picture that cannot be drawn is said and stops nothing."""
    try:
        drawn = plot_losses(curves, target, title=title, marks=marks, unit=unit)
    except Exception as error:  # a font, a name, a full disk: the weights matter more
        reporter.warn(f"no {target.name}: {type(error).__name__}: {error}")
        return False
    if not drawn:
        reporter.note(
            f"No {target.name}: matplotlib is not installed (pip install 'growkit[plots]')."
        )
    return drawn
