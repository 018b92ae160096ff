"""What an arm came to, as numbers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

from growkit.study.intervals import Spread, spread_of
from growkit.study.results import Arm, StudyResult
from growkit.study.savings import Saving, savings
from growkit.study.statistics import Finding, findings


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
