"""What training needs from whoever watches it: notes, warnings and one progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """A progress bar in the unit of its total."""

    def advance(self, amount: float) -> None: ...

    def describe(self, text: str) -> None: ...


class Reporter(Protocol):
    """The part of `growkit.cli.output.Output` that training uses."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def progress(
        self, description: str, total: float, *, unit: str = "B"
    ) -> AbstractContextManager[Bar]: ...


class _SilentBar:
    def advance(self, amount: float) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class Silent:
    """Reports nothing: for use as a library."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextmanager
    def progress(self, description: str, total: float, *, unit: str = "B") -> Iterator[Bar]:
        yield _SilentBar()
