# SPDX-License-Identifier: Apache-2.0
"""Names in matplotlib's figures: ``$`` begins a formula there, and control characters break SVG."""

from __future__ import annotations

from typing import Any

from growkit.core.terminal_text import printable


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
