"""What training from scratch would have cost for an arm's final loss. No torch.

Read between runs from scratch of several budgets, each with a decay of its own: the fall of one run
in its decay says nothing of what a shorter run would have reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from growkit.core.quantities import percent
from growkit.study.results import Arm, Point, StudyResult
from growkit.study.savings import flops_to, mean_of
from growkit.study.statistics import CONFIDENCE, Estimate, estimate, t_quantile

Bound = Literal["", "at least", "at most"]


@dataclass(frozen=True)
class ScratchSaving:
    """One grown arm beside the curve from scratch.

    Attributes:
        arm: the arm.
        needed: seed -> training FLOPs that from scratch needs for the arm's final loss.
        bound: what ``needed`` is: itself; ``at least``, where a loss lies below that of every run
            from scratch; ``at most``, where it lies above.
        saved: of 1 - FLOPs of the arm / needed, paired by seed; None where seeds lie on both sides.
        compared: how many arms stand beside the curve.
    """

    arm: Arm
    needed: dict[int, float]
    bound: Bound
    saved: Estimate | None
    compared: int = 1

    @property
    def corrected(self) -> tuple[float, float] | None:
        """The 95 % interval that holds for all arms beside the curve together (Bonferroni); of a
        bound there is none."""
        if self.bound or self.saved is None or self.saved.standard_error is None:
            return None
        coverage = 1 - (1 - CONFIDENCE) / self.compared
        reach = t_quantile(coverage, self.saved.count - 1) * self.saved.standard_error
        return self.saved.mean - reach, self.saved.mean + reach

    def sentence(self) -> str:
        """The saving in words."""
        if self.saved is None:
            return (
                f"{self.arm.label}: what it saves against from scratch cannot be read, since its "
                "seeds lie on both sides of the budgets from scratch."
            )
        bound = f"{self.bound} " if self.bound else ""
        text = (
            f"{self.arm.label} saves {bound}{percent(self.saved.mean, 1)} of the training FLOPs "
            "that from scratch needs for the same loss"
        )
        if self.saved.low is None or self.saved.high is None:
            return f"{text} (one seed)."
        if self.bound:
            return f"{text} ({self.saved.count} seeds; beyond the budgets from scratch)."
        text += f" (95 % CI {interval((self.saved.low, self.saved.high))}, {self.saved.count} seeds"
        if self.compared > 1 and self.corrected is not None:
            text += f"; corrected for {self.compared} arms {interval(self.corrected)}"
        return text + ")."


def interval(ends: tuple[float, float]) -> str:
    """Two parts of one as percentages."""
    low, high = ends
    return f"{percent(low, 1)} to {percent(high, 1)}"


def scratch_runs(result: StudyResult, shape: str) -> dict[int, list[Point]]:
    """Seed -> (training FLOPs, tokens, final loss) of the runs from scratch of a shape, by FLOPs.

    Empty unless the study trained the shape from scratch with two budgets or more.
    """
    arms = [arm for arm in result.arms if arm.from_scratch and arm.shape == shape]
    if len({arm.budget for arm in arms}) < 2:
        return {}
    points: dict[int, list[Point]] = {}
    for arm in arms:
        for run in arm.runs:
            if isfinite(run.final_loss):
                end = Point(run.flops, run.tokens, run.final_loss)
                points.setdefault(run.seed, []).append(end)
    return {
        seed: sorted(found, key=lambda point: point.flops)
        for seed, found in points.items()
        if len(found) > 1
    }


def scratch_savings(result: StudyResult) -> list[ScratchSaving]:
    """Of every grown arm whose shape was trained from scratch with several budgets."""
    found = []
    for arm in result.arms:
        curve = {} if arm.from_scratch else scratch_runs(result, arm.shape)
        if one := _beside(arm, curve):
            found.append(one)
    return [ScratchSaving(one.arm, one.needed, one.bound, one.saved, len(found)) for one in found]


def _beside(arm: Arm, curve: dict[int, list[Point]]) -> ScratchSaving | None:
    needed, bounds, saved = {}, set(), []
    for run in arm.runs:
        points = curve.get(run.seed)
        if not points or not isfinite(run.final_loss):
            continue
        at = flops_to(points, run.final_loss)
        needed[run.seed] = points[-1].flops if at is None else at
        above = run.final_loss > points[0].loss
        bounds.add("at least" if at is None else "at most" if above else "")
        saved.append(1 - run.flops / needed[run.seed])
    if not saved:
        return None
    both = {"at least", "at most"} <= bounds
    bound: Bound = "at least" if "at least" in bounds else "at most" if "at most" in bounds else ""
    return ScratchSaving(arm, needed, bound, None if both else estimate(saved))


def mean_needed(saving: ScratchSaving) -> float:
    """Mean over the seeds."""
    return mean_of(list(saving.needed.values())) or 0.0
