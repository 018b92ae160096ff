"""The canvas of every figure, the look of its lines, and the figure as text inside a page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from growkit.core.errors import UsageError
from growkit.core.printed_text import literal_text

WIDTH = 6.2
INK, SOFT, GRID, PAPER = "#1b1f24", "#6b7480", "#d5dae0", "#ffffff"
# Okabe & Ito's colours, which the colour-blind tell apart (without their yellow).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# What these are called in the style sheet of a page, which has them for light and dark.
NAMES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"} | {
    color.lower(): f"c{number}" for number, color in enumerate(COLORS)
}
# Lines with no more points than this show them.
FEW = 24


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
def canvas(key: str, size: tuple[float, float] = (WIDTH, 3.4)) -> Iterator[Any]:
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
    look: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    )
    look |= {"axes.edgecolor": SOFT, "grid.color": GRID, "font.size": 9.5, "axes.titlesize": 9.5}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    # Text stays text: searchable, small.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, **look}):
        drawn = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(drawn)
        yield drawn


def points(count: int, marker: str = "o") -> dict[str, Any]:
    """How a line of so many points marks them: a single one would not be seen otherwise."""
    return {"marker": marker if count <= FEW else None, "markersize": 6 if count == 1 else 3.5}


def line_label(text: str, width: int = 30) -> str:
    """A name as matplotlib shows it as it is: no formulas, not hidden by an underscore."""
    text = "\n".join(textwrap.wrap(text.replace("$", r"\$"), width)) or " "
    return " " + text if text.startswith("_") else text


def legend_below(drawn: Any) -> None:
    """The names of all lines below the plots, which keep their height."""
    shown: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if not shown:
        return
    longest = max(len(line) for label in shown for line in label.splitlines())
    columns = min(len(shown), 3 if longest <= 22 else 2 if longest <= 38 else 1)
    rows = math.ceil(len(shown) / columns)
    lines = max(label.count("\n") for label in shown) + 1
    width, height = drawn.get_size_inches()
    drawn.set_size_inches(width, height + 0.1 + rows * (0.05 + 0.14 * lines))
    drawn.legend(
        shown.values(), shown, loc="outside lower left", ncols=columns, fontsize=8.5,
        frameon=False, handlelength=2.6, borderpad=0.2, labelspacing=0.35,
    )  # fmt: skip


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


def themed(svg: str) -> str:
    """The figure in the colours of its page, light or dark."""

    def variable(found: re.Match[str]) -> str:
        name = NAMES.get(found[2].lower())
        return f"{found[1]}var(--{name})" if name else found[0]

    return re.sub(r"((?:fill|stroke|stop-color): ?)(#[0-9a-fA-F]{6})\b", variable, svg)


def png_bytes(drawn: Any) -> bytes:
    """The figure as a PNG picture."""
    literal_text(drawn)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()


def finished(drawn: Any, figure: Figure, *, png: bool = False) -> Figure:
    """``figure`` with its picture; one that cannot be rendered says so and stops nothing."""
    try:
        picture = png_bytes(drawn) if png else b""
        return replace(figure, svg=svg_text(drawn, figure.key), png=picture)
    except Exception as error:  # a font, a name that the renderer does not take
        return replace(figure, caption=f"Not shown: {type(error).__name__}: {error}")
