"""The canvas of every figure, and the figure as SVG text that stands in a page by itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.plot_text import literal_text


@dataclass(frozen=True)
class Figure:
    """One figure; ``svg`` is empty when there are no data for it, and ``caption`` says so then.

    ``png`` holds the same picture where it was asked for.
    """

    key: str
    title: str
    caption: str
    svg: str
    png: bytes = b""


@contextmanager
def canvas(key: str, size: tuple[float, float] = (5.4, 3.4)) -> Iterator[Any]:
    """A matplotlib figure of ``size`` inches; the same data give the same bytes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UsageError(
            "A report needs matplotlib, which is not installed.",
            "Run: pip install 'growkit[plots]'.",
        ) from error
    # Text stays text: searchable, small.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9}):
        drawn = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(drawn)
        yield drawn


def svg_text(drawn: Any, key: str) -> str:
    """The figure as an <svg> element whose ids are its own in the page."""
    literal_text(drawn)
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    return re.sub(r"url\(#", f"url(#{key}-", text)


def png_bytes(drawn: Any) -> bytes:
    """The figure as a PNG picture."""
    literal_text(drawn)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def finished(drawn: Any, figure: Figure, *, png: bool = False) -> Figure:
    """``figure`` with its picture; one that cannot be rendered says so and stops nothing."""
    try:
        picture = png_bytes(drawn) if png else b""
        return replace(figure, svg=svg_text(drawn, figure.key), png=picture)
    except Exception as error:  # a font, a name that the renderer does not take
        return replace(figure, caption=f"Not shown: {type(error).__name__}: {error}")
