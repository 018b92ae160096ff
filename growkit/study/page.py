"""The page of a study: what was asked, what was run, what it says and what it cannot say."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

import yaml

from growkit.core.errors import UsageError
from growkit.core.quantities import human_count, human_seconds, percent
from growkit.core.whole_file import write_whole
from growkit.report.canvas import Figure
from growkit.report.page import figures_html, page_html, table_html
from growkit.study.caveats import limits
from growkit.study.figures import SERIES
from growkit.study.results import Arm, StudyResult
from growkit.study.statistics import seeds_text, verdicts
from growkit.study.table import Table, comparisons, markdown_text, tables


def study_page(
    result: StudyResult, figures: Sequence[Figure], *, command: str | None = None, note: str = ""
) -> str:
    """The HTML text: one file that asks nothing of a network.

    Args:
        figures: as :func:`growkit.study.figures.draw_figures` gives them.
        command: reproduces the study; by default the one that runs the recipe on the page.
        note: stands where the figures are (why there are none).
    """
    command = command or f"growkit study study.yaml --out {shlex.quote(result.name)}"
    recipe = yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True, width=96)
    plots = figures_html(figures, wide=True) if figures else ""
    body = (
        _section("The question", f"<p>{escape(result.question)}</p>\n")
        + _section("What was run", _list(run_text(result)) + _table(arms_table(result)))
        + _section("What it says", _list(verdicts(result)) + _table(comparisons(result)))
        + _section("Figures", (f"<p>{escape(note)}</p>\n" if note else "") + plots)
        + _section("Tables", "".join(map(_table, tables(result)[1:])))
        + _section("What it cannot say", _list(limits(result)))
        + _section(
            "Reproduce it",
            f"<pre>{escape(command)}</pre>\n"
            "<p>with this recipe as study.yaml:</p>\n"
            f"<pre>{escape(recipe)}</pre>\n",
        )
    )
    return page_html(f"Study: {result.name}", body)


def run_text(result: StudyResult) -> list[str]:
    """Budget, data, machine and how far the study is."""
    planned, done = len(result.arms) * len(result.seeds), sum(len(arm.runs) for arm in result.arms)
    seconds = sum(run.seconds for arm in result.arms for run in arm.runs)
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    return [
        f"Budget: {result.budget:.3g} training FLOPs for every arm, what its source cost included.",
        f"Sequences of {result.sequence_length:,} tokens"
        + (
            f"; every held-out loss is of {result.held_out_tokens:,} predicted tokens."
            if result.held_out_tokens
            else "."
        ),
        f"{len(result.arms)} arms with {seeds_text(result.seeds)}: {done} of {planned} runs are "
        f"finished{f' ({human_seconds(seconds)} of one worker)' if done else ''}.",
        f"Machine: {machine}." if machine else "Machine: not recorded.",
        f"Last run: {result.date}." if result.date else "No run is finished.",
    ]


def arms_table(result: StudyResult) -> Table:
    """What each arm does, phase by phase, and how its learning rate was found."""
    columns = ("arm", "phases", "learning-rate sweep", "shape", "parameters", "FLOPs a token")
    return Table(
        "Arms",
        columns,
        tuple(
            (
                arm.label,
                _phases(arm),
                _sweep(arm),
                arm.shape[:12],
                human_count(arm.parameters),
                f"{arm.flops_per_token:.3g}",
            )
            for arm in result.arms
        ),
        "Loss in brackets: what the growth itself changed, before a step. Equal shapes are equal "
        "configurations of the final model. FLOPs a token: of training it.",
        words=3,
    )


def _phases(arm: Arm) -> str:
    if not arm.runs:
        return "from scratch" if arm.from_scratch else "not finished"
    texts: list[str] = []
    for number, phase in enumerate(arm.runs[0].phases):
        change = phase.change or ("from scratch" if not texts else "trained on")
        promised = [phase.exactness] if phase.exactness else []
        if number:
            # What the growth itself did to the loss, before a single step.
            jumps = [
                run.phases[number].first_loss - run.phases[number - 1].last_loss for run in arm.runs
            ]
            promised.append(f"loss {fmean(jumps):+.4f}")
        said = f" ({', '.join(promised)})" if promised else ""
        texts.append(f"{change}{said}, {human_count(phase.tokens)} tokens")
    return " → ".join(texts)


def _sweep(arm: Arm) -> str:
    if arm.sweep is None:
        return "none: given"
    tried = ", ".join(f"{rate:.3g}" for rate, _ in arm.sweep.losses)
    edge = ", at the edge" if arm.sweep.at_edge else ""
    return f"{arm.sweep.chosen:.3g} of {tried} on {percent(arm.sweep.share)} of the steps{edge}"


def _section(title: str, html: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{html}</section>\n"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def _table(table: Table) -> str:
    note = f'<p class="missing">{escape(table.note)}</p>\n' if table.note else ""
    cells = table_html(table.columns, table.rows, table.words)
    return f"<h3>{escape(table.title)}</h3>\n{cells}{note}"


PAGE = "study.html"
TABLE = "table.md"


def write_study(
    result: StudyResult,
    folder: Path,
    *,
    command: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write ``study.json``, ``table.md``, the figures and ``study.html``, each whole or not at all.

    Args:
        command: the one that reproduces the study, for the page.
        note: is told what could not be written. Without matplotlib that is the figures, and those
            that lie there stay.

    Returns:
        The files, ``study.json`` first and the page last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [result.write(folder), write_whole(folder / TABLE, markdown(result))]
    figures, without = _figures(result)
    if without:
        note(without)
    written += _write_figures(figures, folder)
    page = study_page(result, figures, command=command, note=without)
    return [*written, write_whole(folder / PAGE, page)]


def markdown(result: StudyResult) -> str:
    """``table.md``: the verdicts in words, the tables and the limits."""
    listed = "\n".join(f"* {markdown_text(line)}" for line in verdicts(result))
    cannot = "\n".join(f"* {markdown_text(line)}" for line in limits(result))
    shown = "\n".join(table.markdown() for table in tables(result))
    name, question = markdown_text(result.name), markdown_text(result.question)
    return (
        f"# {name}\n\n{question}\n\n{listed}\n\n{shown}\nWhat this study cannot say:\n\n{cannot}\n"
    )


def _figures(result: StudyResult) -> tuple[list[Figure], str]:
    """The figures, and why there are none."""
    from growkit.study.figures import draw_figures

    try:
        return draw_figures(result), ""
    except UsageError as error:
        return [], f"No figures: {error}"


def _write_figures(figures: list[Figure], folder: Path) -> list[Path]:
    """An SVG each, a PNG of those that have one; figures that have no data any more go away."""
    written = []
    kept = {f"{figure.key}.svg" for figure in figures}
    for old in folder.glob(f"{SERIES}*.svg") if figures else ():
        if old.name not in kept:
            old.unlink()
    for figure in figures:
        for ending, content in ((".svg", figure.svg), (".png", figure.png)):
            target = folder / (figure.key + ending)
            if content:
                written.append(write_whole(target, content))
            elif not figure.svg:
                target.unlink(missing_ok=True)
    return written
