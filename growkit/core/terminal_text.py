# SPDX-License-Identifier: Apache-2.0
"""Text that came from a file or a name, made safe to show in a terminal."""

from __future__ import annotations


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
