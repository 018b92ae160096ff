"""The tables of a study: as Markdown, for a page and for a terminal. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Literal

from growkit.core.printed_text import printable
from growkit.core.quantities import human_count, human_seconds, percent
from growkit.study.results import Arm, StudyResult
from growkit.study.savings import ArmFigures, Saving, arm_figures, learning_rates, mean_of
from growkit.study.scratch_curve import ScratchSaving, interval, mean_needed, scratch_savings
from growkit.study.statistics import Estimate, Finding, Spread, findings, seeds_text, spread_of

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# Final models whose sizes differ by less are compared as equal in parameters.
ALIKE = 0.01
SPENT = "training FLOPs"
COLUMNS = (
    "arm", "parameters", "seeds", SPENT, "final loss", "difference (95 % CI)", "FLOPs to target",
    "saving", "tokens", "learning rate", "wall time",
)  # fmt: skip


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

    def without(self, *columns: str) -> Table:
        """The table without these columns."""
        kept = [number for number, name in enumerate(self.columns) if name not in columns]
        rows = (self.columns, *self.rows)
        head, *body = (tuple(row[number] for number in kept) for row in rows)
        words = sum(number < self.words for number in kept)
        return replace(self, columns=head, rows=tuple(body), words=words)

    def rich(self) -> RichTable:
        """For a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        def literal(text: str) -> Text:  # names are no markup, whatever the console
            return Text(printable(text))

        table = RichTable(
            title=literal(self.title), title_justify="left",
            caption=literal(self.note) or None, caption_justify="left",
        )  # fmt: skip
        for number, column in enumerate(self.columns):
            cells = [column, *(row[number] for row in self.rows)]
            width = max(len(word) for cell in cells for word in cell.split())
            justify: Literal["left", "right"] = "left" if number < self.words else "right"
            table.add_column(literal(column), justify=justify, overflow="fold", min_width=width)
        for row in self.rows:
            table.add_row(*map(literal, row))
        return table


def markdown_text(text: str) -> str:
    """Text that means nothing in Markdown's tables."""
    text = " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
    return text.replace("<", "&lt;")


def equal_flops(result: StudyResult) -> Table:
    """All arms, the lowest mean final loss first."""
    figures = arm_figures(result)
    alike = " and equal parameters" if len(figures) > 1 and len(_groups(figures)) == 1 else ""
    table = Table(
        f"Equal FLOPs{alike}: {result.budget:.3g} training FLOPs each, by final loss",
        COLUMNS,
        _rows(figures, result),
        _note(result),
    )
    if result.one_budget:
        return table.without(SPENT)
    table = replace(table, title="The arms, by final loss")
    if scratch_savings(result):  # the curve says it better: a run drops in its decay
        table = replace(table.without("FLOPs to target", "saving"), note=_spent_note(result))
    return table


def from_scratch_needs(result: StudyResult) -> Table:
    """The grown arms beside runs from scratch of several budgets."""
    found = scratch_savings(result)
    return Table(
        "Training FLOPs saved against from scratch",
        ("arm", SPENT, "final loss", "from scratch needs", "saved", "95 % CI",
         "corrected CI", "seeds"),
        tuple(map(_saving_row, found)),
        "What from scratch needs for the same final loss is read between its runs of several "
        "budgets, seed by seed, as linear in log FLOPs; beyond them nothing is read, and the "
        "saving is a bound. Intervals are Student's over the seeds; the corrected ones hold for "
        "all arms of the table together (Bonferroni).",
    )  # fmt: skip


def equal_parameters(result: StudyResult) -> list[Table]:
    """For every size of the final model with more than one arm, the arms that have it.

    None where all arms have one size: the table at equal FLOPs is at equal parameters then.
    Sizes within 1 % count as one; differences are those to arms of the same table.
    """
    return [
        Table(
            f"Equal parameters: {_sizes(group)}" + (", and equal FLOPs" * result.one_budget),
            COLUMNS,
            _rows(_within(group), result),
        ).without(*([SPENT] if result.one_budget else ["FLOPs to target", "saving"]))
        for group in _groups(arm_figures(result))
        if 1 < len(group) < len(result.arms)
    ]


def comparisons(result: StudyResult) -> Table:
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
        "Final held-out losses in nats per token, paired by seed; intervals are Student's over the "
        "paired differences, each for itself; p (Holm) is corrected for all comparisons together."
        if rows
        else "The recipe asks for no comparison.",
        words=3,
    )


def measures(result: StudyResult) -> list[Table]:
    """The other figures of the final models, a line each: there can be dozens."""
    arms = [arm for arm in result.arms if any(run.measures for run in arm.runs)]
    rows = []
    for name in sorted({name for arm in arms for run in arm.runs for name in run.measures}):
        values = [[run.measures[name] for run in arm.runs if name in run.measures] for arm in arms]
        cells = (_loss(spread_of(found)) if found else "" for found in values)
        rows.append((name.replace("_", " "), *cells))
    columns = ("measure", *(arm.label for arm in arms))
    note = "Of the final models, mean ± standard deviation over the seeds."
    return [Table("Other measures", columns, tuple(rows), note)] if rows else []


def tables(result: StudyResult) -> list[Table]:
    """Everything, in reading order: the comparisons first."""
    needs = [from_scratch_needs(result)] if scratch_savings(result) else []
    return [
        comparisons(result), equal_flops(result), *needs, *equal_parameters(result),
        *measures(result),
    ]  # fmt: skip


def rich_tables(result: StudyResult) -> list[RichTable]:
    """The arms for a terminal; what the verdicts say in words beside it is left out."""
    arms = equal_flops(result).without("difference (95 % CI)", "tokens", "wall time")
    return [arms.rich()]


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


def _rows(figures: Sequence[ArmFigures], result: StudyResult) -> tuple[tuple[str, ...], ...]:
    return tuple(_row(one, result) for one in sorted(figures, key=lambda one: one.order))


def _row(one: ArmFigures, result: StudyResult) -> tuple[str, ...]:
    runs = one.arm.runs
    tokens, seconds = mean_of([run.tokens for run in runs]), mean_of([run.seconds for run in runs])
    return (
        one.arm.label,
        human_count(one.arm.parameters),
        f"{len(runs)} of {one.planned}",
        f"{result.budget_of(one.arm):.3g}",
        _loss(one.loss),
        "; ".join(map(_difference, one.findings)),
        _flops(one.saving),
        _saved(one.saving),
        "" if tokens is None else human_count(tokens),
        _rates(one.arm, result),
        "" if seconds is None else human_seconds(seconds),
    )


def _saving_row(one: ScratchSaving) -> tuple[str, ...]:
    bound = f"{one.bound} " if one.bound else ""
    saved, corrected = one.saved, one.corrected
    known = not bound and saved is not None and saved.low is not None and saved.high is not None
    return (
        one.arm.label,
        f"{mean_of([run.flops for run in one.arm.runs]):.3g}",
        _loss(spread_of([run.final_loss for run in one.arm.runs])),
        f"{bound}{mean_needed(one):.3g}",
        f"{bound}{percent(saved.mean, 1)}" if saved is not None else "",
        interval((saved.low, saved.high)) if known else "",  # type: ignore[union-attr, arg-type]
        interval(corrected) if corrected is not None else "",
        str(len(one.needed)),
    )


def _loss(spread: Spread | None) -> str:
    if spread is None:
        return "unfinished"
    if not isfinite(spread.mean):
        return "not finite"
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


def _rates(arm: Arm, result: StudyResult) -> str:
    rates = [f"{rate:.3g}" for rate in learning_rates(arm)]
    text = " then ".join(rate for i, rate in enumerate(rates) if i == 0 or rate != rates[i - 1])
    if arm.sweep is None:
        return text
    if result.rate_owner(arm.name) != arm.name:
        return f"{text} (not its own)"
    return text + (" (edge of the sweep)" if arm.sweep.at_edge else "")


def _note(result: StudyResult) -> str:
    target = (
        f"the loss {result.target:g}"
        if result.target is not None
        else "the final loss of the from-scratch arm of the same shape and seed"
    )
    return (
        f"Final loss: held out, nats per token, mean ± standard deviation over "
        f"{seeds_text(result.seeds)}. Target: {target}; saving: 1 - FLOPs to it / FLOPs of that "
        "from-scratch arm to it, blank where a seed did not reach it. Training FLOPs count from "
        "the first step of the first model. Wall time: a seed, on one worker."
    )


def _spent_note(result: StudyResult) -> str:
    return (
        f"Final loss: held out, nats per token, mean ± standard deviation over "
        f"{seeds_text(result.seeds)}. Training FLOPs count from the first step of the first model. "
        "Wall time: a seed, on one worker."
    )


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None:
        return ""
    return f"{estimate.low:+.4f} to {estimate.high:+.4f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
