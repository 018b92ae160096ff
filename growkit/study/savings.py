"""FLOPs to reach a loss, and what an arm saves against training from scratch. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from growkit.study.intervals import Estimate, Spread, estimate, spread_of
from growkit.study.results import Arm, Point, Run, StudyResult


@dataclass(frozen=True)
class Saving:
    """FLOPs of one arm to its targets, by seed.

    Attributes:
        arm: its name.
        reference: name of the from-scratch arm of the same shape, None where the study has none.
        targets: seed -> loss to reach; only the seeds for which there is one.
        flops: seed -> training FLOPs to it, None where it was not reached.
        reference_flops: the same of the reference.
    """

    arm: str
    reference: str | None
    targets: dict[int, float]
    flops: dict[int, float | None]
    reference_flops: dict[int, float | None]

    @property
    def reached(self) -> list[float]:
        """FLOPs of the seeds that reached their targets."""
        return [flops for flops in self.flops.values() if flops is not None]

    @property
    def spread(self) -> Spread | None:
        """Of the FLOPs; None unless every seed reached its target: a mean of those that did would
        flatter the arm."""
        return spread_of(self.reached) if len(self.reached) == len(self.flops) else None

    @property
    def saved(self) -> Estimate | None:
        """1 - FLOPs / FLOPs of the reference, paired by seed; None as in :attr:`spread`, without a
        reference, and for the reference itself."""
        if self.reference in (None, self.arm) or not self.flops:
            return None
        parts = []
        for seed, flops in self.flops.items():
            reference = self.reference_flops.get(seed)
            if flops is None or not reference:
                return None
            parts.append(1.0 - flops / reference)
        return estimate(parts)


def flops_to(curve: Sequence[Point], target: float) -> float | None:
    """First training FLOPs at which a curve is at or below ``target``; None when it never is.

    Between two evaluations the loss is taken as linear in log FLOPs (from 0 FLOPs: in FLOPs).
    """
    before: Point | None = None
    for point in curve:
        if point.loss <= target:
            return point.flops if before is None else _between(before, point, target)
        before = point
    return None


def _between(before: Point, after: Point, target: float) -> float:
    if not isfinite(before.loss):
        return after.flops
    part = (before.loss - target) / (before.loss - after.loss)
    if before.flops <= 0:
        return before.flops + part * (after.flops - before.flops)
    return float(before.flops * (after.flops / before.flops) ** part)


def from_scratch(result: StudyResult, arm: Arm) -> Arm | None:
    """The arm itself or the first one of its shape that was trained from scratch."""
    alike = [other for other in result.arms if other.from_scratch and other.shape == arm.shape]
    return arm if arm in alike else next(iter(alike), None)


def savings(result: StudyResult) -> list[Saving]:
    """One for every arm, in their order."""
    return [_saving(result, arm) for arm in result.arms]


def _saving(result: StudyResult, arm: Arm) -> Saving:
    reference = from_scratch(result, arm)
    others: dict[int, Run] = {run.seed: run for run in reference.runs} if reference else {}
    targets = {}
    for run in arm.runs:
        if result.target is not None:
            targets[run.seed] = result.target
        elif run.seed in others and isfinite(others[run.seed].final_loss):
            targets[run.seed] = others[run.seed].final_loss
    runs = {run.seed: run for run in arm.runs}
    return Saving(
        arm=arm.name,
        reference=reference.name if reference else None,
        targets=targets,
        flops={seed: flops_to(runs[seed].curve, loss) for seed, loss in targets.items()},
        reference_flops={
            seed: flops_to(others[seed].curve, loss)
            for seed, loss in targets.items()
            if seed in others
        },
    )
