"""FLOPs to a loss: exact on curves that are linear in log FLOPs, and never invented."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_studies import BUDGET, growth_study, loss_at, made_arm, made_study

from growkit.study.results import Point
from growkit.study.savings import flops_to, savings

SCRATCH = {1: 3.50, 2: 3.60, 3: 3.45}


def curve(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(flops, int(flops), loss) for flops, loss in pairs]


@given(st.floats(3.45, 4.9), st.lists(st.floats(12, 15), min_size=1, max_size=9, unique=True))
def test_crossings_are_exact_on_a_log_linear_curve(target: float, places: list[float]) -> None:
    flops = sorted({1e12, BUDGET, *(10.0**place for place in places)})
    points = curve(*((f, loss_at(f, 3.4)) for f in flops))
    exact = BUDGET * 10 ** ((3.4 - target) / 0.5)
    assert flops_to(points, target) == pytest.approx(exact, rel=1e-9)


def test_first_crossing_counts() -> None:
    points = curve((1, 5.0), (10, 4.0), (100, 4.5), (1000, 3.0))
    assert flops_to(points, 4.0) == 10 and flops_to(points, 4.5) == pytest.approx(10**0.5)
    assert flops_to(points, 5.0) == 1 and flops_to(points, 6.0) == 1
    assert flops_to(points, 2.9) is None and flops_to([], 9.0) is None


def test_from_zero_flops_and_over_a_jump() -> None:
    assert flops_to(curve((0, 5.0), (10, 4.0)), 4.5) == 5  # no logarithm of 0
    growth = curve((1, 5.0), (10, 4.0), (10, 4.4), (100, 3.4))
    assert flops_to(growth, 4.2) == pytest.approx(10**0.8)
    assert flops_to(growth, 3.9) == pytest.approx(10**1.5)
    assert flops_to(curve((1, 5.0), (10, 4.4), (10, 4.0)), 4.2) == 10
    diverged = curve((1, 5.0), (10, math.nan), (100, 4.0))
    assert flops_to(diverged, 4.5) == 100


def test_saving_is_paired_and_exact() -> None:
    """0.03 nats lower on a curve of 0.5 nats a decade: 10 ** (-0.06) of the FLOPs."""
    lower = {seed: loss - 0.03 for seed, loss in SCRATCH.items()}
    result = made_study(made_arm("scratch", SCRATCH), made_arm("grown", lower, source=0.2))
    scratch, grown = savings(result)
    assert scratch.saved is None and scratch.reference == "scratch"
    assert scratch.spread is not None and scratch.spread.mean == pytest.approx(BUDGET)
    assert grown.saved is not None
    assert grown.saved.mean == pytest.approx(1 - 10**-0.06)
    assert grown.saved.high - grown.saved.low < 1e-9  # type: ignore[operator]


def test_unpaired_targets_would_differ() -> None:
    """Negative control: the targets of other seeds give another saving, so seeds do matter."""
    lower = {seed: loss - 0.03 for seed, loss in SCRATCH.items()}
    turned = dict(zip((2, 3, 1), lower.values(), strict=True))
    result = made_study(made_arm("scratch", SCRATCH), made_arm("grown", turned, source=0.2))
    saved = savings(result)[1].saved
    assert saved is None or saved.mean != pytest.approx(1 - 10**-0.06, abs=0.01)


def test_a_seed_that_does_not_reach_it_is_not_averaged_away() -> None:
    mixed = {1: 3.40, 2: 3.61, 3: 3.40}
    result = made_study(made_arm("scratch", SCRATCH), made_arm("grown", mixed, source=0.2))
    grown = savings(result)[1]
    assert len(grown.reached) == 2 and grown.flops[2] is None
    assert grown.spread is None and grown.saved is None


def test_a_given_target() -> None:
    result = replace(growth_study(), target=3.7)
    scratch, signal, _ = savings(result)
    assert set(scratch.targets.values()) == {3.7}
    assert scratch.flops[1] == pytest.approx(BUDGET * 10 ** (-0.2 / 0.5))
    ratios = [signal.flops[seed] / scratch.flops[seed] for seed in SCRATCH]  # type: ignore[operator]
    assert signal.saved is not None
    assert signal.saved.mean == pytest.approx(1 - sum(ratios) / 3)


def test_references_have_the_same_shape() -> None:
    arms = [
        made_arm("small", SCRATCH, shape="small"),
        made_arm("large", SCRATCH),
        made_arm("grown", SCRATCH, source=0.2),
        made_arm("odd", SCRATCH, source=0.2, shape="odd"),
    ]
    found = savings(made_study(*arms))
    assert [one.reference for one in found] == ["small", "large", "large", None]
    assert found[3].targets == {} and found[3].spread is None and found[3].saved is None
    given_target = savings(made_study(*arms, target=3.7))[3]
    assert given_target.spread is not None and given_target.saved is None
