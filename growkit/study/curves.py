"""Curves of an arm's seeds as one line with a band. No torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.study.results import Arm, StudyResult

Array = npt.NDArray[np.float64]
# FLOPs summed in another order may differ by this part.
NEAR = 1e-9


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest over the seeds at the same places."""

    places: Array
    mean: Array
    low: Array
    high: Array

    def part(self, first: float, last: float) -> Band:
        """Places from ``first`` to ``last``, with the ends."""
        kept = (self.places >= first * (1 - NEAR)) & (self.places <= last * (1 + NEAR))
        return Band(self.places[kept], self.mean[kept], self.low[kept], self.high[kept])

    def until(self, last: float) -> Band:
        """Places before ``last`` and the first that is there: not what a growth made of it."""
        count = int((self.places < last * (1 - NEAR)).sum()) + 1
        return Band(self.places[:count], self.mean[:count], self.low[:count], self.high[:count])


def band_of(curves: Sequence[Sequence[tuple[float, float]]]) -> Band | None:
    """Curves of (place, value); where places differ, interpolated at the first curve's places that
    all curves cover. None without points."""
    if not curves or not all(curves):
        return None
    lines = [np.asarray(curve, dtype=np.float64) for curve in curves]
    places = lines[0][:, 0]
    if all(np.array_equal(places, line[:, 0]) for line in lines):
        values = np.stack([line[:, 1] for line in lines])
    else:
        first, last = max(line[0, 0] for line in lines), min(line[-1, 0] for line in lines)
        places = places[(places >= first) & (places <= last)]
        values = np.stack([np.interp(places, line[:, 0], line[:, 1]) for line in lines])
    if not places.size:
        return None
    return Band(places, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def loss_band(arm: Arm) -> Band | None:
    """Held-out loss against FLOPs, over the arm's finished seeds."""
    curves = [[(point.flops, point.loss) for point in run.curve] for run in arm.runs]
    return band_of(curves)


def series_band(arm: Arm, name: str) -> Band | None:
    """A series against tokens, over the arm's seeds that have it."""
    return band_of([run.series[name] for run in arm.runs if run.series.get(name)])


def growths(arm: Arm) -> list[tuple[float, float]]:
    """(FLOPs, held-out loss) where each phase after the first begins, means over the seeds."""
    if not arm.runs:
        return []
    marks = []
    for number in range(1, min(len(run.phases) for run in arm.runs)):
        spent = [sum(phase.flops for phase in run.phases[:number]) for run in arm.runs]
        losses = [run.phases[number].first_loss for run in arm.runs]
        marks.append((float(np.mean(spent)), float(np.mean(losses))))
    return marks


def common_start(arm: Arm, arms: Sequence[Arm]) -> float:
    """FLOPs up to which another arm has the same runs: a source that several arms grow from."""
    if not arm.runs:
        return 0.0
    others = {
        phase.key
        for other in arms
        if other.name != arm.name
        for run in other.runs
        for phase in run.phases[:-1]
    }
    spent = 0.0
    for phase in arm.runs[0].phases[:-1]:
        if phase.key not in others:
            break
        spent += phase.flops
    return spent


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
