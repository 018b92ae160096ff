# SPDX-License-Identifier: Apache-2.0
"""Foreign strings in Markdown: names of folders, models and tensors."""

from __future__ import annotations

import re

from growkit.core.terminal_text import printable


def markdown_text(text: object) -> str:
    """Text that means nothing in Markdown or HTML: no link, table, code, tag or second line."""
    return re.sub(r"([\\`*\[\]|<>!])", r"\\\1", printable(text)).replace("\\<", "&lt;")


def markdown_code(text: object) -> str:
    """Text between backticks, which it cannot end."""
    return f"`{printable(text).replace('`', chr(39))}`"
