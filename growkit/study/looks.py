"""What the lines of a study look like, the same in every figure. No torch."""

from __future__ import annotations

import textwrap
from typing import Any

from growkit.study.results import Arm, StudyResult

# Okabe & Ito's colours, which the colour-blind tell apart (without their yellow).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", ":", "-.")
# Of a model from scratch beside the grown one that has the style of the same place above.
DASHES = ("--", (0, (8, 2)), (0, (2, 1)))
MARKERS = ("o", "s", "^")


def line_look(result: StudyResult, arm: Arm) -> dict[str, Any]:
    """Colour and line style of an arm; from scratch is dashed in the colour of its grown twin."""
    twins = _twins(result)
    grown = twins.get(arm.name, arm.name)
    number = [one.name for one in result.arms if one.name not in twins].index(grown)
    lap = number // len(COLORS) % len(STYLES)
    style = DASHES[lap] if arm.name in twins else STYLES[lap]
    return {"color": COLORS[number % len(COLORS)], "linestyle": style}


def marker(result: StudyResult, arm: Arm) -> str:
    """What marks the points of an arm."""
    return MARKERS[result.arms.index(arm) % len(MARKERS)]


def line_label(text: str, width: int = 30) -> str:
    """A name as matplotlib shows it as it is: no formulas, not hidden by an underscore."""
    text = "\n".join(textwrap.wrap(text.replace("$", r"\$"), width)) or " "
    return " " + text if text.startswith("_") else text


def _twins(result: StudyResult) -> dict[str, str]:
    """From-scratch arm -> the first grown arm of its shape; of several with a shape, the first."""
    grown: dict[str, str] = {}
    for arm in result.arms:
        if not arm.from_scratch:
            grown.setdefault(arm.shape, arm.name)
    twins: dict[str, str] = {}
    for arm in result.arms:
        if arm.from_scratch and arm.shape in grown:
            twins[arm.name] = grown.pop(arm.shape)
    return twins
