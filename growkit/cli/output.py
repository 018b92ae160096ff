"""The one place that writes to the terminal: tables, notes, warnings, progress, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from growkit.core.progress import Progress, SilentProgress
from growkit.core.terminal_text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float) -> None:
        self._progress.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=printable(text))

    def figures(self, values: Mapping[str, str]) -> None:
        self._progress.figures = dict(values)


def _figures_table(values: Mapping[str, str]) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for _ in values:
        table.add_column(no_wrap=True)
    table.add_row(*values, style="dim")
    table.add_row(*values.values())
    return table


def _print_line(console: Console, text: str) -> None:
    """Print one line, and let the terminal wrap it, so that a command in the text can be copied."""
    console.print(printable(text), highlight=False, soft_wrap=True)


class Output:
    """Results go to stdout; notes, warnings and progress go to stderr.

    Strings are text, wherever they come from: see :class:`growkit.cli.console.LiteralConsole`.

    Args:
        json_mode: print nothing on stdout but the JSON of :meth:`result`.
        quiet: print warnings and errors only.
        verbose: show tracebacks of errors.
    """

    def __init__(self, *, json_mode: bool = False, quiet: bool = False, verbose: bool = False):
        from growkit.cli.console import LiteralConsole

        self.json_mode, self.quiet, self.verbose = json_mode, quiet, verbose
        self.warnings: list[str] = []
        self.stdout: Console = LiteralConsole(soft_wrap=not sys.stdout.isatty())
        self.stderr: Console = LiteralConsole(stderr=True, soft_wrap=not sys.stderr.isatty())

    def show(self, *renderables: RenderableType) -> None:
        """Print tables and lines for a human on stdout (nothing in JSON or quiet mode).

        A string is one line; cells of tables may have several.
        """
        if not (self.json_mode or self.quiet):
            for renderable in renderables:
                if isinstance(renderable, str):
                    _print_line(self.stdout, renderable)
                else:
                    self.stdout.print(renderable)

    def note(self, text: str) -> None:
        """Print a line of information on stderr, unless quiet or JSON."""
        if not (self.json_mode or self.quiet):
            _print_line(self.stderr, text)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, in every mode, and keep it."""
        self.warnings.append(text)
        self.stderr.print("warning: ", style="yellow", end="")
        _print_line(self.stderr, text)

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
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), *amount, TimeRemainingColumn())

        class View(RichProgress):
            """Bars, and below them the figures that the work reports."""

            figures: ClassVar[dict[str, str]] = {}

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                if self.figures:
                    yield _figures_table(self.figures)

        with View(*columns, console=self.stderr, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(printable(description), total=total))
