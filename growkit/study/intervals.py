"""Means over a handful of seeds: Student's interval, Holm's correction. Standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, cos, inf, isfinite, pi, sin, sqrt
from statistics import fmean, stdev

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
