"""The one place that writes to the terminal: tables, notes, warnings, progress, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from growkit.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float) -> None:
        self._progress.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def figures(self, values: Mapping[str, str]) -> None:
        self._progress.figures = dict(values)


def _figures_table(values: Mapping[str, str]) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for _ in values:
        table.add_column(no_wrap=True)
    table.add_row(*(f"[dim]{label}[/dim]" for label in values))
    table.add_row(*values.values())
    return table


def _print_literally(console: Console, text: str) -> None:
    """Print names and paths as they are (``[x]`` is no markup) and let the terminal wrap them, so
    that a command in the text can be copied."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Output:
    """Results go to stdout; notes, warnings and progress go to stderr.

    Args:
        json_mode: print nothing on stdout but the JSON of :meth:`result`.
        quiet: print warnings and errors only.
        verbose: show tracebacks of errors.
    """

    def __init__(self, *, json_mode: bool = False, quiet: bool = False, verbose: bool = False):
        from rich.console import Console

        self.json_mode, self.quiet, self.verbose = json_mode, quiet, verbose
        self.stdout = Console(soft_wrap=not sys.stdout.isatty())
        self.stderr = Console(stderr=True, soft_wrap=not sys.stderr.isatty())

    def show(self, *renderables: RenderableType) -> None:
        """Print tables and lines for a human on stdout (nothing in JSON or quiet mode)."""
        if not (self.json_mode or self.quiet):
            for renderable in renderables:
                if isinstance(renderable, str):
                    _print_literally(self.stdout, renderable)
                else:
                    self.stdout.print(renderable)

    def note(self, text: str) -> None:
        """Print a line of information on stderr, unless quiet or JSON."""
        if not (self.json_mode or self.quiet):
            _print_literally(self.stderr, text)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, in every mode."""
        self.stderr.print("[yellow]warning:[/yellow] ", end="")
        _print_literally(self.stderr, text)

    def result(self, value: Any) -> None:
        """Print the machine-readable result, in JSON mode only."""
        if self.json_mode:
            sys.stdout.write(json.dumps(value, indent=2, sort_keys=False) + "\n")

    @contextmanager
    def progress(
        self, description: str, total: float | None, *, unit: str = "B"
    ) -> Iterator[Progress]:
        """A progress bar in bytes (``unit="B"``) or in ``unit``; silent when not a terminal.

        Without a total the amount is shown and nothing is foretold.
        """
        if self.json_mode or self.quiet or not self.stderr.is_terminal:
            yield SilentProgress()
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import (
            Progress as RichProgress,
        )

        amount = (
            (DownloadColumn(), TransferSpeedColumn())
            if unit == "B"
            else (MofNCompleteColumn(), TextColumn(unit))
        )
        columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())

        class View(RichProgress):
            """Bars, and below them the figures that the work reports."""

            figures: ClassVar[dict[str, str]] = {}

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                if self.figures:
                    yield _figures_table(self.figures)

        with View(*columns, console=self.stderr, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(description, total=total))
