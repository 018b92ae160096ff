"""The page about runs: a table of them and the figures in one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from growkit.core.whole_file import write_whole
from growkit.report.canvas import Figure
from growkit.report.figures import draw_figures
from growkit.report.html import figures_html, page_html, table_html
from growkit.report.runs import Run

COLUMNS = (
    "run", "goes on from", "parameters", "steps", "tokens", "tokens before", "FLOPs",
    "held-out loss", "perplexity", "before growth", "epochs",
)  # fmt: skip


def write_report(runs: Sequence[Run], target: Path, title: str = "growkit report") -> list[Figure]:
    """Write the page, whole or not at all.

    Returns:
        The figures, those without data too.
    """
    figures = draw_figures(runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page(runs, figures, title))
    return figures


def page(runs: Sequence[Run], figures: Sequence[Figure], title: str) -> str:
    """The HTML text."""
    return page_html(
        title, table_html(COLUMNS, [cells(run) for run in runs]) + figures_html(figures)
    )


def cells(run: Run) -> list[str]:
    """A run's line of the table, in the order of COLUMNS."""
    record = run.record
    held_out = run.series("eval_loss")[1]
    perplexity = run.series("perplexity")[1]
    flops = run.flops([run.tokens_before + run.tokens])[0] if run.flops_per_token else None
    return [
        run.name + (" (grown)" if run.grown else "") + ("" if record else " (unfinished)"),
        run.parent or (run.source.name if run.source else "scratch"),
        f"{record['parameters']:,}" if "parameters" in record else "",
        f"{max(row['step'] for row in run.rows):,}",
        f"{run.tokens:,}",
        f"{run.tokens_before:,}",
        "" if flops is None else f"{flops:.3g}",
        f"{held_out[-1]:.4f}" if held_out else "",
        f"{perplexity[-1]:.3f}" if perplexity else "",
        "" if run.loss_before_growth is None else f"{run.loss_before_growth:.4f}",
        ", ".join(
            (f"{name} " if len(record["data"]) > 1 else "") + f"{use['epochs']:.2f}"
            for name, use in record.get("data", {}).items()
        ),
    ]
