# SPDX-License-Identifier: Apache-2.0
"""A terminal to which any string may be sent: names and file contents have no power over it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from growkit.core.terminal_text import printable

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.text import Text


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
