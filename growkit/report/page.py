"""The page about runs, and the parts that our pages share: no network, no script, light, dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from growkit import __version__
from growkit.core.writing import write_whole
from growkit.report.canvas import Figure, themed
from growkit.report.figures import draw_figures
from growkit.report.runs import Run

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --grid: #e3e7ec;
  --paper: #fff; --panel: #f5f7f9; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8578f;
  --c4: #c98700; --c5: #3a9bd6; --c6: #333; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #9aa5b1; --line: #39424d;
  --grid: #2a323b; --paper: #12161b; --panel: #1a2028; --c0: #56a8e0; --c1: #f0853c; --c2: #2fc79a;
  --c3: #dd8fb9; --c4: #eab040; --c5: #8fd0f5; --c6: #d0d0d0; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, li { max-width: 50rem; } ul { padding-left: 1.2rem; margin: .6rem 0; } li { margin: .3rem 0; }
.lead { font-size: 1.1rem; margin: 0 0 .5rem; }
.table { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; font-weight: 600; color: var(--soft); }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; overflow-wrap: normal; }
th.text, td.text { text-align: left; } td.short { white-space: nowrap; }
td.text { min-width: 8rem; }
.figures { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; padding: .9rem; border: 1px solid var(--line); border-radius: .5rem;
  min-width: 0; max-width: 46rem; }
figure h3 { margin: 0 0 .5rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption, footer, .note { font-size: .85rem; color: var(--soft); }
figcaption { margin-top: .5rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem;
  margin: .7rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: .8rem; margin: .6rem 0; background: var(--panel);
  border-radius: .4rem; font-size: .84rem; line-height: 1.4; }
.verdicts { list-style: none; padding: 0; }
.verdicts li { padding-left: .8rem; border-left: .25rem solid var(--line); }
.verdicts .lower { border-color: var(--c0); } .verdicts .higher { border-color: var(--c1); }
.verdicts .weak { border-left-style: dotted; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .7rem; }
"""
# Numbers up to this length (a mean with its spread) stay on one line.
SHORT = 18
COLUMNS = (
    "run", "continues from", "parameters", "steps", "tokens", "tokens before", "FLOPs",
    "held-out loss", "perplexity", "before growth", "epochs",
)  # fmt: skip


def page_html(title: str, body: str) -> str:
    """The whole page around ``body``."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}"
        f"<footer>growkit {escape(__version__)}</footer>\n</body></html>\n"
    )


def section_html(title: str, html: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{escape(title)}</h2>\n{html}</section>\n"


def list_html(lines: Sequence[str]) -> str:
    """Sentences, one below the other."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def folded_html(title: str, html: str) -> str:
    """What a reader may open."""
    return f"<details><summary>{escape(title)}</summary>\n{html}</details>\n"


def recipe_html(title: str, recipe: object) -> str:
    """A recipe as YAML, folded."""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=96)
    return folded_html(title, f"<pre>{escape(text)}</pre>\n")


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


def figures_html(figures: Sequence[Figure]) -> str:
    """The figures, then a list of those that there are no data for."""
    shown = "".join(
        f'<figure id="{escape(figure.key)}"><h3>{escape(figure.title)}</h3>{themed(figure.svg)}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
        for figure in figures
        if figure.svg
    )
    missing = "".join(
        f"<li>{escape(figure.title)}: {escape(figure.caption)}</li>"
        for figure in figures
        if not figure.svg
    )
    return f'<div class="figures">\n{shown}</div>\n' + (
        f'<ul class="note">{missing}</ul>\n' if missing else ""
    )


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
    """The HTML text: what came out, the table, the figures, and the recipes as they ran."""
    recipes = "".join(recipe_html(run.name, run.recipe) for run in runs)
    return page_html(
        title,
        list_html([summary(run) for run in runs])
        + table_html(COLUMNS, [cells(run) for run in runs], words=2)
        + section_html("Figures", figures_html(figures))
        + samples_html(runs)
        + section_html("Recipes", recipes),
    )


def samples_html(runs: Sequence[Run]) -> str:
    """What each run wrote at its first and its last evaluation (training.samples)."""
    rows = []
    for run in runs:
        written = [row for row in run.rows if isinstance(row.get("samples"), list)]
        for row in written[:1] + written[1:][-1:]:
            for sample in filter(lambda value: isinstance(value, dict), row["samples"]):
                texts = [str(sample.get(key, "")) for key in ("prompt", "text")]
                rows.append([run.name, *texts, f"{row['step']:,}"])
    if not rows:
        return ""
    return section_html("Samples", table_html(("run", "prompt", "text", "step"), rows, words=3))


def summary(run: Run) -> str:
    """What became of a run, in a sentence."""
    losses = run.series("eval_loss")[1]
    text = f"{run.name}: {run.tokens:,} tokens"
    if run.tokens_before:
        text += f" after {run.tokens_before:,} before it"
    if losses:
        text += f", held-out loss {losses[0]:.4f} → {losses[-1]:.4f} nats per token"
    if run.loss_before_growth is not None:
        text += f"; {run.loss_before_growth:.4f} before its growth"
    return text + ("." if run.record else ". It is not finished.")


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
