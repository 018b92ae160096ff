"""What ``growkit study`` shows: the plan before, and the tables after."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.cli.output import Output
    from growkit.study.results import StudyResult
    from growkit.study.study import Choice, Study


def show_plan(
    output: Output, study: Study, choice: Choice, flops_per_second: float | None
) -> dict[str, Any]:
    """Every base and arm with its size and its share of the budget; returns it as plain data."""
    from rich import box
    from rich.table import Table

    from growkit.core.quantities import counted, human_count

    rows, indent = study.outline(choice), "  "
    done, planned = study.progress(choice)
    table = Table(
        title=f"{study.out.name}: {study.nodes.lengths.budget:.3g} training FLOPs per arm, "
        f"{counted(len(choice.seeds), 'seed')}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("run\n  from", overflow="fold", min_width=20)
    for heading in ("para-\nmeters", "FLOPs per\ntoken", "steps", "tokens", "training\nFLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("learning\nrate", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row.name}\n{fill(row.origin, 20, initial_indent=indent, subsequent_indent=indent)}",
            human_count(row.parameters),
            human_count(row.flops_per_token),
            f"{row.steps:,}",
            human_count(row.tokens),
            f"{row.flops:.2e}",
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
    if result.race is not None:
        from growkit.study.race import race_lines

        output.show(*race_lines(result.race, {arm.name: arm.label for arm in result.arms}))
    page = next((path for path in written if path.suffix == ".html"), None)
    output.note("Written: " + ", ".join(path.name for path in written))
    if page is not None:
        output.note(f"open it: xdg-open {shlex.quote(str(page))}")
