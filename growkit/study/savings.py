"""What an arm came to, and what it saves against training from scratch. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

from growkit.study.results import Arm, Point, Run, StudyResult
from growkit.study.statistics import Estimate, Finding, Spread, estimate, findings, spread_of


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


@dataclass(frozen=True)
class ArmFigures:
    """One arm's line as numbers; means are over its finished seeds."""

    arm: Arm
    planned: int
    loss: Spread | None
    findings: tuple[Finding, ...]
    saving: Saving

    @property
    def order(self) -> float:
        """Mean final loss; arms without one come last."""
        return self.loss.mean if self.loss and isfinite(self.loss.mean) else inf

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        runs = self.arm.runs
        saved, reached = self.saving.saved, self.saving.spread
        return {
            "arm": self.arm.name,
            "label": self.arm.label,
            "from_scratch": self.arm.from_scratch,
            "parameters": self.arm.parameters,
            "seeds": [run.seed for run in runs],
            "final_loss": asdict(self.loss) if self.loss else None,
            "comparisons": [
                {
                    "against": finding.comparison.against,
                    "kind": finding.comparison.kind,
                    "difference": asdict(finding.estimate) if finding.estimate else None,
                    "adjusted_p": finding.adjusted_p,
                    "verdict": finding.verdict,
                }
                for finding in self.findings
            ],
            "flops_to_target": asdict(reached) if reached else None,
            "seeds_that_reached_target": len(self.saving.reached),
            "saving": asdict(saved) if saved else None,
            "tokens": mean_of([run.tokens for run in runs]),
            "flops": mean_of([run.flops for run in runs]),
            "learning_rates": learning_rates(self.arm),
            "learning_rate_at_edge": bool(self.arm.sweep and self.arm.sweep.at_edge),
            "seconds": mean_of([run.seconds for run in runs]),
        }


def arm_figures(result: StudyResult) -> list[ArmFigures]:
    """Every arm as numbers, in the order of the recipe."""
    found = findings(result)
    return [
        ArmFigures(
            arm=arm,
            planned=len(result.seeds),
            loss=spread_of([run.final_loss for run in arm.runs]),
            findings=tuple(one for one in found if one.comparison.arm == arm.name),
            saving=saving,
        )
        for arm, saving in zip(result.arms, savings(result), strict=True)
    ]


def learning_rates(arm: Arm) -> list[float]:
    """Peak learning rates of the phases; those of a swept arm without a finished run from there."""
    if arm.runs:
        return [phase.learning_rate for phase in arm.runs[0].phases]
    return [arm.sweep.chosen] if arm.sweep else []


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    spread = spread_of(values)
    return spread.mean if spread else None
