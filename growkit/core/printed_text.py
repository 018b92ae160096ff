# SPDX-License-Identifier: Apache-2.0
"""Text that comes from elsewhere, as a terminal, a markdown page and a figure may show it.

Text that came from a file or a name, made safe to show in a terminal.

Foreign strings in Markdown: names of folders, models and tensors.

Names in matplotlib's figures: ``$`` begins a formula there, and control characters break SVG.
"""

from __future__ import annotations

import re
from typing import Any


def printable(text: object, *, keep: str = "") -> str:
    r"""``str(text)`` with every character that a terminal might obey shown as its escape.

    Escaped, as in Python's ``repr``: control characters (ESC and its C1 form, newline, tab), bidi
    and zero-width characters, surrogates (undecodable bytes of a path), private and unassigned code
    points, and spaces other than U+0020. Everything else, backslash included, stays as it is, so
    that ordinary text comes back unchanged and may be escaped twice without harm.

    Markup such as ``[bold]`` means nothing to our output and stays as it is too: the console of
    :class:`growkit.cli.output.Output` never interprets strings. Whoever prints an error, a note, a
    warning or a table need not call this; the console does.

    Args:
        text: anything that has a text.
        keep: characters that stay, e.g. ``"\n"`` for text of several lines.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        letter if letter.isprintable() or letter in keep else repr(letter)[1:-1] for letter in shown
    )


def markdown_text(text: object) -> str:
    """Text that means nothing in Markdown or HTML: no link, table, code, tag or second line."""
    return re.sub(r"([\\`*\[\]|<>!])", r"\\\1", printable(text)).replace("\\<", "&lt;")


def markdown_code(text: object) -> str:
    """Text between backticks, which it cannot end."""
    return f"`{printable(text).replace('`', chr(39))}`"


def literal_text(figure: Any) -> None:
    """Make every text of a finished figure stand as it is; called once, before it is saved.

    The numbers of logarithmic axes are matplotlib's own formulas and stay what they are.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    formulas: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = axis.get_ticklabels()
            if isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):  # names
                places = axis.get_ticklocs()
                axis.set_ticks(places, [printable(label.get_text()) for label in labels])
            else:
                formulas |= {id(label) for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if id(text) not in formulas:
            text.set_parse_math(False)
            text.set_text(printable(text.get_text(), keep="\n"))
