"""``growkit report``: one self-contained HTML page about training runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from growkit.cli.common import JsonOption, QuietOption, VerboseOption, open_output

PANEL = "Train"


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Output folders of growkit train.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file; default: training/report.html in the last."),
    ] = None,
    json_mode: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw losses, norms, copies, dead heads, lambda and entropies of runs on one HTML page.

    A run that continues from another one (through a growth or not) is drawn behind it.

    [dim]growkit report checkpoints/demo/base checkpoints/demo/grown-trained[/dim]
    """
    output = open_output(json_mode, quiet, verbose)
    from growkit.core.errors import UsageError
    from growkit.report import read_runs, write_report

    read = read_runs(runs)
    target = out or read[-1].folder / "training" / "report.html"
    if target.is_dir():
        raise UsageError(f"The output {str(target)!r} is a folder.", "Give a file with --out.")
    title = "growkit report: " + ", ".join(run.name for run in read)
    figures = write_report(read, target, title)
    shown = [figure for figure in figures if figure.svg]
    output.show(f"{target}: runs {', '.join(run.name for run in read)}; {len(shown)} figures")
    for figure in figures:
        if not figure.svg:
            output.note(f"{figure.title}. {figure.caption}")
    output.note(f"open it: xdg-open {shlex.quote(str(target))}")
    output.result(
        {
            "report": str(target),
            "runs": [run.name for run in read],
            "figures": {figure.key: bool(figure.svg) for figure in figures},
        }
    )
