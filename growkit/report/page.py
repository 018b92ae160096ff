"""The page: a table of the runs and the figures in one HTML file that asks nothing of a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from growkit import __version__
from growkit.report.figures import Figure, draw_figures
from growkit.report.runs import Run

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 0 0 .3rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem;
           margin-top: 1.5rem; }
figure { margin: 0; padding: .8rem; border: 1px solid #ddd; border-radius: .4rem; min-width: 0; }
figure svg { width: 100%; height: auto; }
footer { margin-top: 1.5rem; }
figcaption, footer, .missing { font-size: .85rem; color: #555; }
"""

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
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(page(runs, figures, title), encoding="utf-8")
    os.replace(partial, target)
    return figures


def page(runs: Sequence[Run], figures: Sequence[Figure], title: str) -> str:
    """The HTML text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(run)) + "</tr>\n"
        for run in runs
    )
    shown = "".join(
        f'<figure id="{figure.key}"><h2>{escape(figure.title)}</h2>{figure.svg}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
        for figure in figures
        if figure.svg
    )
    missing = "".join(
        f"<li>{escape(figure.title)}: {escape(figure.caption)}</li>"
        for figure in figures
        if not figure.svg
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n"
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>'
        f'</div>\n<div class="figures">\n{shown}</div>\n'
        + (f'<ul class="missing">{missing}</ul>\n' if missing else "")
        + f"<footer>growkit {escape(__version__)}</footer>\n</body></html>\n"
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
