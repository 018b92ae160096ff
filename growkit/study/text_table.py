"""A table of text: as Markdown and for a terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from growkit.core.terminal_text import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        note: what a reader has to know about them.
        words: how many columns, from the first, are no numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: int = 1

    def markdown(self) -> str:
        """GitHub's Markdown, numbers right-aligned."""
        rule = ["---"] * self.words + ["---:"] * (len(self.columns) - self.words)
        lines = [self.columns, rule, *self.rows]
        body = "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
        note = f"\n\n{markdown_text(self.note)}" if self.note else ""
        return f"**{markdown_text(self.title)}**\n\n{body}{note}\n"

    def without(self, *columns: str) -> Table:
        """The table without these columns."""
        kept = [number for number, name in enumerate(self.columns) if name not in columns]
        rows = (self.columns, *self.rows)
        head, *body = (tuple(row[number] for number in kept) for row in rows)
        words = sum(number < self.words for number in kept)
        return replace(self, columns=head, rows=tuple(body), words=words)

    def rich(self) -> RichTable:
        """For a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        def literal(text: str) -> Text:  # names are no markup, whatever the console
            return Text(printable(text))

        table = RichTable(
            title=literal(self.title), title_justify="left",
            caption=literal(self.note) or None, caption_justify="left",
        )  # fmt: skip
        for number, column in enumerate(self.columns):
            cells = [column, *(row[number] for row in self.rows)]
            width = max(len(word) for cell in cells for word in cell.split())
            justify: Literal["left", "right"] = "left" if number < self.words else "right"
            table.add_column(literal(column), justify=justify, overflow="fold", min_width=width)
        for row in self.rows:
            table.add_row(*map(literal, row))
        return table


def markdown_text(text: str) -> str:
    """Text that means nothing in Markdown's tables."""
    text = " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
    return text.replace("<", "&lt;")
