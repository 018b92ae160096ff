"""The parts that our pages share: a page asks nothing of a network and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from growkit import __version__
from growkit.core.whole_file import write_whole
from growkit.report.canvas import Figure
from growkit.report.figures import draw_figures
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
.figures.wide { grid-template-columns: minmax(0, 1fr); }
td.text, th.text { text-align: left; } td.short { white-space: nowrap; }
section { margin-top: 1.8rem; } h3 { font-size: .95rem; }
pre { overflow-x: auto; padding: .8rem; background: #f6f6f6; font-size: .85rem; }
figure { margin: 0; padding: .8rem; border: 1px solid #ddd; border-radius: .4rem; min-width: 0; }
figure svg { width: 100%; height: auto; }
footer { margin-top: 1.5rem; }
figcaption, footer, .missing { font-size: .85rem; color: #555; }
"""
# Numbers up to this length (a mean with its spread) stay on one line.
SHORT = 16


def page_html(title: str, body: str) -> str:
    """The whole page around ``body``."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}"
        f"<footer>growkit {escape(__version__)}</footer>\n</body></html>\n"
    )


def table_html(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of plain text; the first ``words`` columns are no numbers."""

    def cells(tag: str, line: Sequence[str]) -> str:
        kinds = [
            "text" if number < words else "short" if len(text) <= SHORT else "long"
            for number, text in enumerate(line)
        ]
        pairs = zip(kinds, line, strict=True)
        return "".join(f'<{tag} class="{kind}">{escape(text)}</{tag}>' for kind, text in pairs)

    head = cells("th", columns)
    lines = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table>'
        "</div>\n"
    )


def figures_html(figures: Sequence[Figure], *, wide: bool = False) -> str:
    """The figures, then a list of those that there are no data for; ``wide``: one a line."""
    shown = "".join(
        f'<figure id="{escape(figure.key)}"><h2>{escape(figure.title)}</h2>{figure.svg}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
        for figure in figures
        if figure.svg
    )
    missing = "".join(
        f"<li>{escape(figure.title)}: {escape(figure.caption)}</li>"
        for figure in figures
        if not figure.svg
    )
    return f'<div class="figures{" wide" if wide else ""}">\n{shown}</div>\n' + (
        f'<ul class="missing">{missing}</ul>\n' if missing else ""
    )


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
