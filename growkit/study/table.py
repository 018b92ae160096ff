"""The tables of a study: as data, as Markdown, for a terminal and for a page. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from growkit.quantities import human_count, human_seconds, percent
from growkit.study.findings import Finding, findings, seeds_text
from growkit.study.results import Arm, StudyResult
from growkit.study.savings import Saving, savings
from growkit.study.statistics import Estimate, Spread, spread_of

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# Final models whose sizes differ by less are compared as equal in parameters.
ALIKE = 0.01


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        note: what a reader has to know about them.
        words: how many columns, from the first, are no numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: int = 1

    def markdown(self) -> str:
        """GitHub's Markdown, numbers right-aligned."""
        rule = ["---"] * self.words + ["---:"] * (len(self.columns) - self.words)
        lines = [self.columns, rule, *self.rows]
        body = "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
        note = f"\n\n{markdown_text(self.note)}" if self.note else ""
        return f"**{markdown_text(self.title)}**\n\n{body}{note}\n"

    def rich(self) -> RichTable:
        """For a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title), title_justify="left", caption=Text(self.note) or None,
            caption_justify="left",
        )  # fmt: skip
        for number, column in enumerate(self.columns):
            table.add_column(
                column, justify="left" if number < self.words else "right", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*map(Text, row))  # names are no markup
        return table


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
            "tokens": _mean([run.tokens for run in runs]),
            "flops": _mean([run.flops for run in runs]),
            "learning_rates": learning_rates(self.arm),
            "learning_rate_at_edge": bool(self.arm.sweep and self.arm.sweep.at_edge),
            "seconds": _mean([run.seconds for run in runs]),
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


COLUMNS = (
    "arm", "parameters", "seeds", "final loss", "difference (95 % CI)", "FLOPs to target", "saving",
    "tokens", "learning rate", "wall time",
)  # fmt: skip


def equal_flops(result: StudyResult) -> Table:
    """All arms, the lowest mean final loss first."""
    return Table(
        f"Equal FLOPs: {result.budget:.3g} training FLOPs each, by final loss",
        COLUMNS,
        _rows(arm_figures(result)),
        _note(result),
    )


def equal_parameters(result: StudyResult) -> list[Table]:
    """For every size of the final model with more than one arm, the arms that have it.

    Sizes within 1 % count as one; differences are those to arms of the same table.
    """
    return [
        Table(
            f"Equal parameters: {_sizes(group)}, and equal FLOPs",
            COLUMNS,
            _rows(_within(group)),
        )
        for group in _groups(arm_figures(result))
        if len(group) > 1
    ]


def verdicts(result: StudyResult) -> Table:
    """The comparisons, with what the seeds allow to say."""
    rows = []
    for one in findings(result):
        estimate = one.estimate
        rows.append(
            (
                f"{one.label} against {one.against_label}",
                one.comparison.kind,
                one.word,
                f"{estimate.mean:+.4f}" if estimate else "",
                _interval(estimate),
                str(len(one.differences)),
                _p(estimate.p) if estimate else "",
                _p(one.adjusted_p),
            )
        )
    return Table(
        "Comparisons",
        ("comparison", "at", "verdict", "difference", "95 % CI", "seeds", "p", "p (Holm)"),
        tuple(rows),
        "Final held-out losses in nats a token, paired by seed; intervals are Student's over the "
        "paired differences, each for itself; p (Holm) is corrected for all comparisons together."
        if rows
        else "The recipe asks for no comparison.",
        words=3,
    )


def tables(result: StudyResult) -> list[Table]:
    """Everything, in reading order."""
    return [verdicts(result), equal_flops(result), *equal_parameters(result)]


def _groups(figures: Sequence[ArmFigures]) -> list[list[ArmFigures]]:
    """Arms whose final models have about the same size, the smallest models first."""
    groups: list[list[ArmFigures]] = []
    for one in sorted(figures, key=lambda one: one.arm.parameters):
        if groups and one.arm.parameters <= groups[-1][0].arm.parameters * (1 + ALIKE):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _within(group: Sequence[ArmFigures]) -> list[ArmFigures]:
    """The arms with their comparisons among themselves alone."""
    names = {one.arm.name for one in group}
    return [
        replace(one, findings=tuple(f for f in one.findings if f.comparison.against in names))
        for one in group
    ]


def _sizes(group: Sequence[ArmFigures]) -> str:
    least, most = (end(one.arm.parameters for one in group) for end in (min, max))
    return human_count(least) + ("" if least == most else f" to {human_count(most)}")


def _rows(figures: Sequence[ArmFigures]) -> tuple[tuple[str, ...], ...]:
    return tuple(_row(one) for one in sorted(figures, key=lambda one: one.order))


def _row(one: ArmFigures) -> tuple[str, ...]:
    runs = one.arm.runs
    tokens, seconds = _mean([run.tokens for run in runs]), _mean([run.seconds for run in runs])
    return (
        one.arm.label,
        human_count(one.arm.parameters),
        f"{len(runs)} of {one.planned}",
        _loss(one.loss),
        "; ".join(map(_difference, one.findings)),
        _flops(one.saving),
        _saved(one.saving),
        "" if tokens is None else human_count(tokens),
        _rates(one.arm),
        "" if seconds is None else human_seconds(seconds),
    )


def _loss(spread: Spread | None) -> str:
    if spread is None:
        return "unfinished"
    if spread.deviation is None:
        return f"{spread.mean:.4f}"
    return f"{spread.mean:.4f} ± {spread.deviation:.4f}"


def _difference(finding: Finding) -> str:
    against, estimate = finding.against_label, finding.estimate
    if estimate is None:
        return f"{against}: no common seed"
    if estimate.low is None:
        return f"{against}: {estimate.mean:+.4f} (one seed)"
    return f"{against}: {estimate.mean:+.4f} ({_interval(estimate)}), {finding.word}"


def _flops(saving: Saving) -> str:
    if not saving.flops:
        return ""
    if saving.spread is not None:
        return f"{saving.spread.mean:.3g}"
    if not saving.reached:
        return "not reached"
    return f"reached by {len(saving.reached)} of {len(saving.flops)} seeds"


def _saved(saving: Saving) -> str:
    if saving.reference == saving.arm:
        return "reference"
    saved = saving.saved
    if saved is None:
        return ""
    if saved.low is None or saved.high is None:
        return percent(saved.mean, 1, sign=True)
    mean, low, high = (percent(part, 1, sign=True) for part in (saved.mean, saved.low, saved.high))
    return f"{mean} ({low} to {high})"


def _rates(arm: Arm) -> str:
    rates = [f"{rate:.3g}" for rate in learning_rates(arm)]
    text = " then ".join(rate for i, rate in enumerate(rates) if i == 0 or rate != rates[i - 1])
    return text + (" (edge of the sweep)" if arm.sweep and arm.sweep.at_edge else "")


def _note(result: StudyResult) -> str:
    target = (
        f"the loss {result.target:g}"
        if result.target is not None
        else "the final loss of the from-scratch arm of the same shape and seed"
    )
    return (
        f"Final loss: held out, nats a token, mean ± standard deviation over "
        f"{seeds_text(result.seeds)}. Target: {target}; saving: 1 - FLOPs to it / FLOPs of that "
        "from-scratch arm to it, blank where a seed did not reach it. Training FLOPs count from "
        "the first step of the first model. Wall time: a seed, on one worker."
    )


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None:
        return ""
    return f"{estimate.low:+.4f} to {estimate.high:+.4f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _mean(values: Sequence[float]) -> float | None:
    spread = spread_of(values)
    return spread.mean if spread else None


def markdown_text(text: str) -> str:
    """Text that means nothing in Markdown's tables."""
    text = " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
    return text.replace("<", "&lt;")
