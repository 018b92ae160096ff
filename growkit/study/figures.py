"""The figures of a study: curves over seeds as lines with bands. No torch; matplotlib draws."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.report.canvas import (
    COLORS,
    INK,
    PAPER,
    SOFT,
    WIDTH,
    Figure,
    canvas,
    finished,
    legend_below,
    line_label,
    points,
)
from growkit.study.results import Arm, StudyResult, Sweep
from growkit.study.savings import arm_figures
from growkit.study.scratch_curve import scratch_runs
from growkit.study.statistics import findings

STYLES = ("-", ":", "-.")
# Of a model from scratch beside the grown one that has the style of the same place above.
DASHES = ("--", (0, (8, 2)), (0, (2, 1)))
LOSS = "held-out loss (nats per token)"
FLOPS = "training FLOPs, from the first step of the first model"
# File names of the figures of probes begin so.
SERIES = "series-"
# The part of the budget that the second figure looks at.
END = 0.6
# Intervals longer than so many times the largest difference are cut: two seeds would hide the rest.
CUT = 3.0

Draw = Callable[[Any, StudyResult], bool]
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


def line_look(result: StudyResult, arm: Arm) -> dict[str, Any]:
    """Colour and line style of an arm; from scratch is dashed in the colour of its grown twin."""
    twins = _twins(result)
    grown = twins.get(arm.name, arm.name)
    number = [one.name for one in result.arms if one.name not in twins].index(grown)
    lap = number // len(COLORS) % len(STYLES)
    style = DASHES[lap] if arm.name in twins else STYLES[lap]
    return {"color": COLORS[number % len(COLORS)], "linestyle": style}


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


def draw_figures(result: StudyResult, *, png: bool = True) -> list[Figure]:
    """All figures; those without data say what they would need. The first three have a PNG too.

    Args:
        png: draw those; a page needs none.

    Raises:
        UsageError: matplotlib is not installed.
    """
    pairs = max(len(result.comparisons), 1)
    figures = [
        _figure(
            result, "loss", "Loss against compute", _losses, "a finished run",
            "Mean over the seeds, band from the lowest to the highest; dashed: from scratch in the "
            "shape of the grown arm of that colour; a diamond marks where a grown model begins, "
            "grey is a source that several arms grow from.", png=png,
        ),
        _figure(
            result, "loss-end", "The end of the budget", _end, "a finished run",
            "The same curves near the end, the lowest final loss first in the legend; an arm that "
            "is far off leaves the picture.", png=png,
        ),
        _figure(
            result, "differences", "Paired differences of the final loss", _differences,
            "a comparison with a common seed",
            "Left of 0 the first arm is lower. Small: seeds; large: mean with Student's 95 % "
            "interval (an arrow where it is cut); grey: no difference shown; hollow: not shown any "
            "more after Holm's correction.",
            height=0.75 + 0.46 * pairs, png=png,
        ),
        *_scratch_curve(result, png=png),
        _sweeps(result),
    ]  # fmt: skip
    names = sorted({name for arm in result.arms for run in arm.runs for name in run.series})
    for name in names:
        figures.append(
            _figure(
                result, SERIES + re.sub(r"[^\w-]", "-", name), name.replace("_", " "),
                _series(name), "probes",
                "Probe of the last phase: mean over the seeds, band from the lowest to the "
                "highest.",
            )
        )  # fmt: skip
    return figures


def _scratch_curve(result: StudyResult, *, png: bool) -> list[Figure]:
    """Final losses against budgets; none where from scratch has one budget alone."""
    shapes = dict.fromkeys(arm.shape for arm in result.arms if scratch_runs(result, arm.shape))
    if not shapes:
        return []

    def draw(axes: Any, result: StudyResult) -> bool:
        for shape in shapes:
            _budgets(axes, result, shape)
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs of the whole run")
        axes.set_ylabel("final " + LOSS)
        return True

    return [
        _figure(
            result, "budgets", "Final loss against budget", draw, "runs from scratch",
            "Every point is the end of a whole run with its own decay, mean over the seeds, bars "
            "from the lowest to the highest. What lies below the line from scratch saves compute: "
            "its distance to the line, to the right.", png=png,
        )
    ]  # fmt: skip


def _budgets(axes: Any, result: StudyResult, shape: str) -> None:
    """The line from scratch of one shape and the arms that ended in it."""

    def ends(arm: Arm) -> tuple[float, float, float, float]:
        losses = [run.final_loss for run in arm.runs]
        flops = float(np.mean([run.flops for run in arm.runs]))
        return flops, float(np.mean(losses)), min(losses), max(losses)

    arms = [arm for arm in result.arms if arm.shape == shape and arm.runs]
    line = sorted(ends(arm) for arm in arms if arm.from_scratch)
    axes.plot(*zip(*((at, loss) for at, loss, _, _ in line), strict=True), "--", color=SOFT)
    for arm in arms:
        at, loss, low, high = ends(arm)
        color = SOFT if arm.from_scratch else line_look(result, arm)["color"]
        label = line_label(arm.label)
        bars = [[loss - low], [high - loss]]
        axes.errorbar([at], [loss], bars, fmt="o", color=color, markersize=4, label=label)


def _figure(
    result: StudyResult,
    key: str,
    title: str,
    draw: Draw,
    needs: str,
    caption: str,
    *,
    height: float = 3.6,
    png: bool = False,
) -> Figure:
    with canvas(key, (WIDTH, height)) as drawn:
        axes = drawn.add_subplot()
        if not draw(axes, result):
            return Figure(key, title, f"Not shown: it needs {needs}.", "")
        axes.grid()
        legend_below(drawn)
        return finished(drawn, Figure(key, title, caption, ""), png=png)


def _line(axes: Any, band: Band, label: str | None, look: dict[str, Any], among: int) -> None:
    """Mean and band; many bands over each other are paler."""
    axes.plot(
        band.places, band.mean, label=label, linewidth=1.4, **(points(len(band.places), ".") | look)
    )
    if (band.low < band.high).any():
        pale = min(0.15, 0.6 / among)
        axes.fill_between(
            band.places, band.low, band.high, color=look["color"], alpha=pale, linewidth=0
        )


def _losses(axes: Any, result: StudyResult) -> bool:
    shared: dict[tuple[str, ...], Band] = {}
    shown = []
    for arm in result.arms:
        band = loss_band(arm)
        if band is None:
            continue
        start = common_start(arm, result.arms)
        if start:
            keys = tuple(run.phases[0].key for run in arm.runs)
            before = shared.get(keys)
            if before is None or before.places[-1] < start:
                shared[keys] = band.until(start)
        _line(
            axes,
            band.part(max(start, 1e-300), inf),
            line_label(arm.label),
            line_look(result, arm),
            len(result.arms),
        )
        for flops, loss in growths(arm):
            color = line_look(result, arm)["color"]
            axes.plot([flops], [loss], "D", color=color, markersize=5, markerfacecolor=PAPER)
        shown.append(band)
    for number, band in enumerate(shared.values()):
        look = {"color": SOFT, "linestyle": "-"}
        _line(axes, band.part(1e-300, inf), None if number else "common source", look, 4)
    if not shown:
        return False
    # The fall from log(vocabulary) would take all the height: from 2 % of the budget on.
    seen = [band.part(result.budget * 0.02, inf) for band in shown]
    _frame(axes, [[*part.low, *part.high] for part in seen])
    axes.set_xscale("log")
    axes.set_xlim(left=result.budget * 0.02)
    axes.set_xlabel(FLOPS)
    axes.set_ylabel(LOSS)
    return True


def _end(axes: Any, result: StudyResult) -> bool:
    ends: list[list[float]] = []
    for one in sorted(arm_figures(result), key=lambda one: one.order):
        band = loss_band(one.arm)
        if band is None or one.loss is None:
            continue
        part = band.part(result.budget * END, inf)
        label = line_label(f"{one.loss.mean:.4f}  {one.arm.label}", 38)
        look = line_look(result, one.arm) | {"marker": ".", "markersize": 4}
        _line(axes, part, label, look, len(result.arms))
        ends.append([*part.low, *part.high])
    if not ends:
        return False
    _frame(axes, ends)
    axes.set_xlim(left=result.budget * END)
    axes.set_xlabel(FLOPS)
    axes.set_ylabel(LOSS)
    return True


def _frame(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    """Height for what most curves need: one that diverged would press the others flat."""
    finite = [kept for curve in curves if (kept := [loss for loss in curve if isfinite(loss)])]
    if not finite:
        return
    low, tops = min(map(min, finite)), [max(curve) for curve in finite]
    high = min(max(tops), low + 2.5 * (median(tops) - low))
    pad = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - pad, high + pad)


def _differences(axes: Any, result: StudyResult) -> bool:
    found = findings(result)
    values = [abs(value) for one in found for value in one.differences.values()]
    if not values:
        return False
    reach = CUT * max(values) or 1e-6
    colors = {"lower": COLORS[0], "higher": COLORS[1], "none": SOFT, "unknown": SOFT}
    for row, one in enumerate(found):
        color = colors[one.direction]
        # The two arms stand above their interval: beside it they would take half of the width.
        axes.text(
            0.01, row - 0.32, line_label(f"{one.label} against {one.against_label}", 80),
            transform=axes.get_yaxis_transform(), va="center", fontsize=8.5,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
        seeds = list(one.differences.values())
        axes.plot(seeds, [row] * len(seeds), "o", color=color, markersize=3, alpha=0.6)
        estimate = one.estimate
        if estimate is None:
            axes.text(0, row, "no common seed", va="center", ha="center", fontsize=8, color=SOFT)
        elif estimate.low is not None and estimate.high is not None:
            low, high = max(estimate.low, -reach), min(estimate.high, reach)
            axes.plot([low, high], [row, row], color=color, linewidth=1.6)
            face = PAPER if one.direction in ("lower", "higher") and not one.survives else color
            axes.plot([estimate.mean], [row], "D", color=color, markerfacecolor=face, markersize=6)
            for end, whole, arrow in ((low, estimate.low, "<"), (high, estimate.high, ">")):
                axes.plot([end], [row], arrow if end != whole else "|", color=color, markersize=6)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks([])
    axes.set_ylim(len(found) - 0.6, -0.6)
    width = max(abs(end) for end in axes.get_xlim())
    axes.set_xlim(-width, width)
    axes.set_xlabel("difference of the final held-out loss (nats per token)")
    return True


def _sweeps(result: StudyResult) -> Figure:
    """A small plot each, on a scale of its own: the losses of arms lie far from each other."""
    figure = Figure(
        "sweeps", "Learning-rate sweeps",
        "Held-out loss of the trials; ringed: the rate that was chosen; x: diverged. Every arm or "
        "base that had trials of its own, each with a scale of its own.", "",
    )  # fmt: skip
    found = {
        name: sweep
        for name, sweep in result.sweeps().items()
        if any(isfinite(loss) for _, loss in sweep.losses)
    }
    if not found:
        return replace(figure, caption="Not shown: it needs a learning-rate sweep.")
    rates = sorted({rate for sweep in found.values() for rate, _ in sweep.losses})
    columns = min(len(found), 2)
    rows = ceil(len(found) / columns)
    with canvas("sweeps", (WIDTH, 0.3 + 1.75 * rows)) as drawn:
        plots = drawn.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        for axes in plots[len(found) :]:
            axes.remove()
        for axes, (name, sweep) in zip(plots, found.items(), strict=False):
            _sweep(axes, sweep)
            edge = ", at the edge" if sweep.at_edge else ""
            axes.set_title(line_label(result.label(name) + edge, 40), loc="left")
            axes.set_xscale("log")
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45, fontsize=8)
            axes.set_xticks([], minor=True)
            axes.tick_params(labelbottom=True)
            axes.margins(0.12, 0.2)
            axes.grid()
        drawn.supxlabel("peak learning rate", fontsize=9.5)
        drawn.supylabel("held-out loss of the trials", fontsize=9.5)
        return finished(drawn, figure)


def _sweep(axes: Any, sweep: Sweep) -> None:
    axes.plot(*zip(*sweep.losses, strict=True), "o-", color=COLORS[0], markersize=4)
    chosen = [loss for rate, loss in sweep.losses if rate == sweep.chosen]
    axes.plot(
        [sweep.chosen] * len(chosen), chosen, "o", markersize=10, color=COLORS[1],
        markerfacecolor="none",
    )  # fmt: skip
    for rate in (rate for rate, loss in sweep.losses if not isfinite(loss)):
        axes.plot([rate], [0.93], "x", color=COLORS[1], transform=axes.get_xaxis_transform())


def _series(name: str) -> Draw:
    def draw(axes: Any, result: StudyResult) -> bool:
        drawn = False
        for arm in result.arms:
            band = series_band(arm, name)
            if band is not None:
                _line(axes, band, line_label(arm.label), line_look(result, arm), len(result.arms))
                drawn = True
        axes.set_xlabel("tokens")
        axes.set_ylabel(line_label(name.replace("_", " ")))
        if drawn:
            from matplotlib.ticker import EngFormatter

            axes.xaxis.set_major_formatter(EngFormatter())
        return drawn

    return draw
