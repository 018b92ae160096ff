"""Student's interval and Holm's correction against numbers of textbooks, and by simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.study.statistics import estimate, holm, spread_of, t_coverage, t_quantile


# Two-sided critical values as every table of Student's t prints them (NIST/SEMATECH e-Handbook
# of Statistical Methods, 1.3.6.7.2).
@pytest.mark.parametrize(
    ("freedom", "coverage", "t"),
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776),
        (5, 0.95, 2.571), (9, 0.95, 2.262), (10, 0.95, 2.228), (30, 0.95, 2.042),
        (100, 0.95, 1.984), (1, 0.90, 6.314), (2, 0.99, 9.925), (7, 0.99, 3.499),
        (5, 0.998, 5.893),
    ],
)  # fmt: skip
def test_t_table(freedom: int, coverage: float, t: float) -> None:
    assert t_quantile(coverage, freedom) == pytest.approx(t, abs=6e-4)


@given(st.floats(0, 60), st.integers(1, 60))
def test_coverage_is_the_integral_of_the_density(t: float, freedom: int) -> None:
    """The finite sums against Simpson's rule over Student's density."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi
    )

    def density(angle: float) -> float:  # x = sqrt(freedom) tan(angle): a bounded integrand
        return constant * math.sqrt(freedom) * math.cos(angle) ** (freedom - 1)

    steps, end = 400, math.atan(t / math.sqrt(freedom))
    weights = [1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1)]
    total = sum(w * density(end * i / steps) for i, w in enumerate(weights)) * end / steps / 3
    assert t_coverage(t, freedom) == pytest.approx(2 * total, abs=1e-9)


def test_paired_interval_of_a_textbook() -> None:
    """Student's own example (1908, Biometrika 6, 1-25): hours of sleep gained, two drugs."""
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = estimate(differences)
    assert found.count == 10 and found.mean == pytest.approx(1.58)
    assert found.standard_error == pytest.approx(0.38896, abs=1e-5)
    assert (found.low, found.high) == (
        pytest.approx(0.7001, abs=1e-4),
        pytest.approx(2.4599, abs=1e-4),
    )
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert not found.holds_zero


def test_few_values() -> None:
    one = estimate([0.3])
    assert (one.mean, one.low, one.high, one.p) == (0.3, None, None, None) and one.holds_zero
    two = estimate([0.1, 0.3])  # 12.706 standard errors of 0.1 to each side
    assert (two.low, two.high) == (
        pytest.approx(-1.0706, abs=1e-4),
        pytest.approx(1.4706, abs=1e-4),
    )
    same = estimate([0.0, 0.0, 0.0])
    assert same.holds_zero and same.p == 1.0
    always = estimate([0.5, 0.5])
    assert not always.holds_zero and always.p == 0.0
    with pytest.raises(ValueError, match="no values"):
        estimate([])
    assert spread_of([]) is None and spread_of([2.0]).deviation is None  # type: ignore[union-attr]


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Three seeds with a known mean difference: 95 of 100 intervals hold it (normal law: 83)."""
    draw = random.Random(5).gauss
    samples = [[draw(0.02, 0.01) for _ in range(3)] for _ in range(4000)]
    found = [estimate(sample) for sample in samples]
    held = sum(one.low <= 0.02 <= one.high for one in found) / len(found)  # type: ignore[operator]
    assert held == pytest.approx(0.95, abs=0.012)
    normal = sum(abs(one.mean - 0.02) < 1.96 * one.standard_error for one in found) / len(found)  # type: ignore[operator]
    assert normal < 0.85  # the shortcut that would be wrong with so few seeds


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_never_below_the_raw_p_nor_above_bonferroni(values: list[float]) -> None:
    for raw, adjusted in zip(values, holm(values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(values))
    order = sorted(range(len(values)), key=values.__getitem__)
    sorted_ = [holm(values)[index] for index in order]
    assert sorted_ == sorted(sorted_)
