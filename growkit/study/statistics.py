"""The answers to a study's comparisons: paired by seed, with intervals. No torch.

Two arms with the same seed read the same data in the same order, so the seeds are pairs: what they
have in common (an easy or hard order of the data) cancels in the difference. The interval is
Student's over the paired differences, and the p-values of all comparisons of a study are corrected
together (Holm). Standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import atan, cos, inf, isfinite, pi, sin, sqrt
from statistics import fmean, stdev

from growkit.study.results import Comparison, StudyResult

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        count: seeds.
        standard_error: of the mean; None with one seed, as all that follow.
        low, high: ends of the 95 % interval.
        p: of a mean of 0, two-sided.
    """

    count: int
    mean: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def holds_zero(self) -> bool:
        """0 lies in the interval, or there is none."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Spread:
    """Losses over seeds; ``deviation`` is the sample standard deviation, None with one seed and
    where a loss is not finite."""

    count: int
    mean: float
    deviation: float | None
    lowest: float
    highest: float


def spread_of(values: Sequence[float]) -> Spread | None:
    """Mean, standard deviation and range; None without values."""
    if not values:
        return None
    known = len(values) > 1 and all(map(isfinite, values))
    deviation = stdev(values) if known else None
    return Spread(len(values), fmean(values), deviation, min(values), max(values))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with Student's 95 % interval and the p-value of a mean of 0.

    Holds for differences that are normal, which a handful of seeds cannot show; with two seeds the
    interval is 12.7 standard errors to each side, and that is what two seeds say.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to estimate a mean from")
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(1, mean)
    freedom = len(values) - 1
    error = stdev(values) / sqrt(len(values))
    reach = t_quantile(CONFIDENCE, freedom) * error
    t = abs(mean) / error if error else (inf if mean else 0.0)
    return Estimate(
        len(values), mean, error, mean - reach, mean + reach, 1.0 - t_coverage(t, freedom)
    )


def t_coverage(t: float, freedom: int) -> float:
    """P(abs(T) < t) of Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4; 1 - coverage is good to about 1e-15.
    """
    if freedom < 1 or t < 0:
        raise ValueError(f"no Student t with {freedom} degrees of freedom at {t}")
    angle = atan(t / sqrt(freedom)) if isfinite(t) else pi / 2
    # Odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ...
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (power + 1) / (power + 2)
    part = sin(angle) * total
    return min(1.0, 2 / pi * (angle + part) if odd else part)


def t_quantile(coverage: float, freedom: int) -> float:
    """The t with P(abs(T) < t) = coverage, by bisection."""
    low, high = 0.0, 1.0
    while t_coverage(high, freedom) < coverage:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_coverage(middle, freedom) < coverage else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the k-th smallest of m times m - k + 1, made ascending.

    Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Finding:
    """The answer to one comparison.

    Attributes:
        differences: seed -> final loss of the arm minus that of what it is compared with, for the
            seeds that both have with finite losses.
        left_out: seeds that both have, where a loss is not finite.
        estimate: of the mean difference; None without a common seed.
        adjusted_p: after Holm's correction over the comparisons of the study.
        compared: how many comparisons were corrected together.
    """

    comparison: Comparison
    label: str
    against_label: str
    differences: dict[int, float]
    left_out: tuple[int, ...]
    estimate: Estimate | None
    adjusted_p: float | None = None
    compared: int = 1

    @property
    def verdict(self) -> str:
        """The answer in words, beginning with the arm where a difference is shown."""
        shown = self.direction in ("lower", "higher")
        return f"{self.label} {self.answer}" if shown else self.answer

    @property
    def answer(self) -> str:
        """The answer in words, for where the two arms are named already."""
        return self._answer() + (
            f" (left out, loss not finite: {seeds_text(self.left_out)})" if self.left_out else ""
        )

    @property
    def direction(self) -> str:
        """``lower``, ``higher``, ``none`` (no difference shown) or ``unknown`` (no statement)."""
        if self.estimate is None or self.estimate.low is None:
            return "unknown"
        if self.estimate.holds_zero:
            return "none"
        return "lower" if self.estimate.mean < 0 else "higher"

    @property
    def survives(self) -> bool:
        """The difference is shown after Holm's correction too."""
        return self.adjusted_p is not None and self.adjusted_p < 1 - CONFIDENCE

    @property
    def word(self) -> str:
        """The answer as a table says it."""
        if self.direction == "unknown":
            return "no statement"
        if self.direction == "none":
            return "no difference shown"
        return self.direction + ("" if self.survives else ", not after Holm")

    def _answer(self) -> str:
        if self.estimate is None:
            return "no seed finished by both: no statement"
        mean, low, high = self.estimate.mean, self.estimate.low, self.estimate.high
        if low is None or high is None:
            return f"one seed: no statement (difference {mean:+.4f})"
        digits = decimals(low, high)
        seeds = f"{self.estimate.count} seeds"
        if self.estimate.holds_zero:
            return (
                f"no difference shown ({mean:+.{digits}f}, 95 % CI {low:+.{digits}f} to "
                f"{high:+.{digits}f}, {seeds})"
            )
        ends = sorted((abs(low), abs(high)))
        text = (
            f"{self.direction} by {abs(mean):.{digits}f} "
            f"(95 % CI {ends[0]:.{digits}f} to {ends[1]:.{digits}f}, {seeds})"
        )
        if not self.survives:
            text += (
                f"; not shown any more when corrected for {self.compared} comparisons "
                f"(Holm p = {self.adjusted_p:.2g})"
            )
        return text


def findings(result: StudyResult) -> list[Finding]:
    """The answers to a study's comparisons, in its order."""
    found = [_finding(result, comparison) for comparison in result.comparisons]
    p_values = {
        _pair(finding): finding.estimate.p
        for finding in found
        if finding.estimate is not None and finding.estimate.p is not None
    }
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        replace(finding, adjusted_p=adjusted.get(_pair(finding)), compared=len(adjusted))
        for finding in found
    ]


def _pair(finding: Finding) -> frozenset[str]:
    """The two arms, whichever is asked about: a question asked twice is one test."""
    return frozenset((finding.comparison.arm, finding.comparison.against))


def verdicts(result: StudyResult) -> list[str]:
    """A line for every comparison, the answer in words."""
    lines = [
        f"{one.label} against {one.against_label}, at {one.comparison.kind}: {one.answer}."
        for one in findings(result)
    ]
    return lines or ["The recipe asks for no comparison."]


def _finding(result: StudyResult, comparison: Comparison) -> Finding:
    arm, against = result.arm(comparison.arm), result.arm(comparison.against)
    losses = {run.seed: run.final_loss for run in arm.runs}
    others = {run.seed: run.final_loss for run in against.runs}
    both = sorted(losses.keys() & others.keys())
    differences = {
        seed: losses[seed] - others[seed]
        for seed in both
        if isfinite(losses[seed]) and isfinite(others[seed])
    }
    return Finding(
        comparison=comparison,
        label=arm.label,
        against_label=against.label,
        differences=differences,
        left_out=tuple(seed for seed in both if seed not in differences),
        estimate=estimate(list(differences.values())) if differences else None,
    )


def decimals(low: float, high: float) -> int:
    """Decimals that show an interval: two figures of its width and no end as 0 that is not 0.

    3 to 6 in all.
    """
    digits = 3
    while digits < 6 and any(0 < abs(x) < 10.0**-digits for x in (low, high, (high - low) / 10)):
        digits += 1
    return digits


def seeds_text(seeds: Sequence[int]) -> str:
    """``seed 1`` or ``seeds 1, 2``."""
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))
