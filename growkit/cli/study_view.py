"""What ``growkit study`` shows: the plan before, and the tables after."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.cli.output import Output
    from growkit.study.results import StudyResult
    from growkit.study.study import Choice, Study


def show_plan(
    output: Output, study: Study, choice: Choice, flops_per_second: float | None
) -> dict[str, Any]:
    """Every base and arm with its size and its share of the budget; returns it as plain data."""
    from rich.table import Table

    rows = study.outline(choice)
    done, planned = study.progress(choice)
    table = Table(
        title=f"{study.out.name}: {study.nodes.lengths.budget:.3g} training FLOPs an arm, "
        f"{len(choice.seeds)} seeds",
        title_justify="left",
    )
    table.add_column("run")
    table.add_column("goes on from")
    for heading in ("parameters", "FLOPs a token", "steps", "tokens", "FLOPs"):
        table.add_column(heading, justify="right")
    table.add_column("learning rate")
    for row in rows:
        table.add_row(
            row.name,
            row.origin,
            f"{row.parameters:,}",
            f"{row.flops_per_token:.3g}",
            f"{row.steps:,}",
            f"{row.tokens:,}",
            f"{row.flops:.3g}",
            row.rate,
        )
    output.show(table)
    total = study.cost(choice)
    text = f"{done} of {planned} runs are there; all of them take {total:.3g} training FLOPs"
    if flops_per_second is not None:
        text += f", {total / flops_per_second / 3600:.1f} hours at {flops_per_second:.3g} a second"
    output.show(text + ".")
    return {
        "budget": study.nodes.lengths.budget,
        "runs": planned,
        "finished": done,
        "flops": total,
        "arms": [row.to_dict() for row in rows],
    }


def show_result(output: Output, result: StudyResult, written: Sequence[Path]) -> None:
    """The tables, the verdicts, and where everything is."""
    from growkit.study.statistics import verdicts
    from growkit.study.table import rich_tables

    output.show(*rich_tables(result))
    for verdict in verdicts(result):
        output.show(verdict)
    page = next((path for path in written if path.suffix == ".html"), None)
    output.note("Written: " + ", ".join(path.name for path in written))
    if page is not None:
        output.note(f"open it: xdg-open {shlex.quote(str(page))}")
