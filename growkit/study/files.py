"""Everything a study leaves in its folder; works while runs are still missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from growkit.core.errors import UsageError
from growkit.core.whole_file import write_whole
from growkit.report.canvas import Figure
from growkit.study.caveats import limits
from growkit.study.figures import SERIES
from growkit.study.page import study_page
from growkit.study.results import StudyResult
from growkit.study.statistics import verdicts
from growkit.study.table import tables
from growkit.study.text_table import markdown_text

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
