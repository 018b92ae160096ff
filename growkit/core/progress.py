"""What long work reports to. The terminal (`growkit.cli.output.Output`) is one such reporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """One progress bar: amounts in the unit of the total that it was opened with."""

    def advance(self, amount: float) -> None: ...

    def describe(self, text: str) -> None: ...

    def figures(self, values: Mapping[str, str]) -> None:
        """Show named figures below the bar."""


class Reporter(Protocol):
    """Whoever watches: notes, warnings, progress bars, and a log where no bar can be drawn."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def log(self, text: str) -> None:
        """What a bar shows where there is one: a line in the log of a batch job."""

    def progress(
        self, description: str, total: float | None, *, unit: str = "B"
    ) -> AbstractContextManager[Progress]: ...


class SilentProgress:
    """A bar that nobody sees."""

    def advance(self, amount: float) -> None:
        pass

    def describe(self, text: str) -> None:
        pass

    def figures(self, values: Mapping[str, str]) -> None:
        pass


class Silent:
    """Reports nothing: for use as a library."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    @contextmanager
    def progress(
        self, description: str, total: float | None, *, unit: str = "B"
    ) -> Iterator[Progress]:
        yield SilentProgress()


SILENT = Silent()
