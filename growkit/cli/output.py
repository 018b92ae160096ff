# SPDX-License-Identifier: Apache-2.0
"""The one place that writes to the terminal: tables, notes, warnings, progress, JSON.

A terminal to which any string may be sent: names and file contents have no power over it.

The one place that writes to the terminal: tables, notes, warnings, progress, JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from growkit.core.printed_text import printable

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.text import Text
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from growkit.core.progress import Progress, SilentProgress
from growkit.core.quantities import human_bytes, human_count

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class LiteralConsole(Console):
    """A rich console for which a string is text: no markup, no emoji codes, no control characters.

    Style is given by :class:`rich.text.Text` objects and the ``style`` of rows; whoever builds a
    table need not, and cannot forget to, escape anything. Line breaks stay: cells and headings of
    several lines are ours (:meth:`growkit.cli.output.Output.note` and its like write one line).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings, as cells and titles: escaped before their width is measured."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Everything else, ``Text`` objects with foreign content among them."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float) -> None:
        self._progress.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=printable(text))

    def figures(self, values: Mapping[str, str]) -> None:
        self._progress.figures = dict(values)


class _LogProgress(SilentProgress):
    """Where there is no terminal: a line of long work, when nothing else was said for a while."""

    EVERY = 10.0  # seconds

    def __init__(self, output: Output, name: str, total: float | None, unit: str) -> None:
        self._output, self._name, self._total, self._unit = output, name, total, unit
        self._done, output.logged = 0.0, time.monotonic()

    def advance(self, amount: float) -> None:
        self._done += amount
        if time.monotonic() < self._output.logged + self.EVERY:
            return
        show = human_bytes if self._unit == "B" else human_count
        unit = "" if self._unit == "B" else f" {self._unit}"
        of = "" if self._total is None else f" of {show(self._total)}"
        self._output.log(f"{self._name}: {show(self._done)}{of}{unit}")


def _figures_table(values: Mapping[str, str], width: int) -> RenderableType:
    """Labels above figures, side by side while the terminal is wide enough, then below."""
    from rich.console import Group
    from rich.table import Table

    rows: list[list[tuple[str, str]]] = [[]]
    left = width
    for label, value in values.items():
        needed = max(len(label), len(value)) + 2
        if needed > left and rows[-1]:
            rows.append([])
            left = width
        rows[-1].append((label, value))
        left -= needed
    tables = []
    for row in rows:
        table = Table.grid(padding=(0, 2))
        for _ in row:
            table.add_column(no_wrap=True)
        table.add_row(*(label for label, _ in row), style="dim")
        table.add_row(*(value for _, value in row))
        tables.append(table)
    return Group(*tables)


def _print_line(console: Console, text: str) -> None:
    """Print one line, and let the terminal wrap it, so that a command in the text can be copied."""
    console.print(printable(text), highlight=False, soft_wrap=True)


class Output:
    """Results go to stdout; notes, warnings and progress go to stderr.

    Strings are text, wherever they come from: see :class:`growkit.cli.output.LiteralConsole`.

    Args:
        json_mode: print nothing on stdout but the JSON of :meth:`result`.
        quiet: print warnings and errors only.
        verbose: show tracebacks of errors.
    """

    def __init__(self, *, json_mode: bool = False, quiet: bool = False, verbose: bool = False):

        self.json_mode, self.quiet, self.verbose = json_mode, quiet, verbose
        self.warnings: list[str] = []
        self.logged = 0.0  # when the last line of the log was written
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

    def log(self, text: str) -> None:
        """Print a line on stderr where there is no terminal, unless quiet or JSON."""
        if not self.stderr.is_terminal:
            self.logged = time.monotonic()
            self.note(text)

    def result(self, value: Any) -> None:
        """Print the machine-readable result, in JSON mode only."""
        if self.json_mode:
            sys.stdout.write(json.dumps(value, indent=2, sort_keys=False) + "\n")

    @contextmanager
    def progress(
        self, description: str, total: float | None, *, unit: str = "B"
    ) -> Iterator[Progress]:
        """A progress bar in bytes (``unit="B"``) or in ``unit``; lines when not a terminal.

        Without a total the amount is shown and nothing is foretold.
        """
        if self.json_mode or self.quiet:
            yield SilentProgress()
            return
        if not self.stderr.is_terminal:
            yield _LogProgress(self, description, total, unit)
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import (
            Progress as RichProgress,
        )
        from rich.text import Text

        class Amount(ProgressColumn):
            """``1.024 k/40.96 k``: short, whatever the total."""

            def render(self, task: Task) -> Text:
                total = "?" if task.total is None else human_count(task.total)
                return Text(f"{human_count(task.completed)}/{total}", style="progress.download")

        amount = (
            (DownloadColumn(), TransferSpeedColumn())
            if unit == "B"
            else (Amount(), TextColumn(unit))
        )
        name = TextColumn("{task.description}", markup=False)
        bar = BarColumn(bar_width=min(40, max(self.stderr.width - 60, 8)))
        columns = (name, bar, *amount, TimeRemainingColumn())
        width = self.stderr.width

        class View(RichProgress):
            """Bars, and below them the figures that the work reports."""

            figures: ClassVar[dict[str, str]] = {}

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                if self.figures:
                    yield _figures_table(self.figures, width)

        with View(*columns, console=self.stderr, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(printable(description), total=total))
