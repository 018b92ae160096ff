"""Shares of a mixture are exact, and which sample comes when is a function of its position."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from growkit.data.mixture import Mixture, spread
from growkit.data.order import RunSampler, SampleOrder

Weight = st.one_of(
    st.integers(0, 9).map(Fraction), st.floats(0.001, 1).map(lambda x: Fraction(str(round(x, 4))))
)
Weights = st.lists(st.tuples(Weight, Weight), min_size=2, max_size=7).filter(
    lambda pairs: all(sum(pair[end] for pair in pairs) > 0 for end in (0, 1))
)


def naive_ideal(weights: list[tuple[Fraction, Fraction]], total: int, g: int) -> list[Fraction]:
    """Oracle: the shares at the middle of each sample, summed one by one."""
    sums = [sum((pair[end] for pair in weights), Fraction(0)) for end in (0, 1)]
    times = [Fraction(2 * h + 1, 2 * total) for h in range(g)]
    return [
        sum(((1 - t) * first / sums[0] + t * last / sums[1] for t in times), Fraction(0))
        for first, last in weights
    ]


@settings(max_examples=60, deadline=None)
@given(weights=Weights, total=st.integers(1, 1500), constant=st.booleans())
@example(weights=[(Fraction(1), Fraction(1))] * 3, total=387, constant=False)
def test_counts_follow_the_weights(
    weights: list[tuple[Fraction, Fraction]], total: int, constant: bool
) -> None:
    if constant:
        weights = [(first, first) for first, _ in weights]
    mixture = Mixture(weights, total)
    counts = [0] * len(weights)
    for g in range(total):
        assert mixture.counts(g) == counts
        ideal = mixture.ideal(g)
        limit = 1 if g % mixture.block == 0 else 2
        assert all(abs(a - b) < limit for a, b in zip(counts, ideal, strict=True))
        source, number = mixture.at(g)
        assert number == counts[source]  # no sample is left out and none comes twice
        counts[source] += 1
    assert sum(counts) == total
    exact = naive_ideal(weights, total, min(total, 100))
    assert mixture.ideal(min(total, 100)) == exact
    if not mixture.constant:  # drawn weights may be constant too, whose blocks end elsewhere
        final = mixture.ideal(total)
        assert all(abs(a - b) < 1 for a, b in zip(counts, final, strict=True))


@settings(max_examples=30, deadline=None)
@given(weights=Weights, start=st.integers(0, 10**7), constant=st.booleans())
def test_any_position_can_be_asked_first(
    weights: list[tuple[Fraction, Fraction]], start: int, constant: bool
) -> None:
    """A fresh reckoning at a far position agrees with one that walked there in steps."""
    if constant:
        weights = [(Fraction(round(f * 10), 10), Fraction(round(f * 10), 10)) for f, _ in weights]
        if not sum(first for first, _ in weights):
            return
        total = 10**8
    else:
        start, total = start % 30_000, 40_000
    fresh, walking = Mixture(weights, total), Mixture(weights, total)
    for place in range(start % 5000, start, 5000 if not constant else 2_000_000):
        walking.at(place)
    assert [fresh.at(start + i) for i in range(300)] == [walking.at(start + i) for i in range(300)]
    assert fresh.at(start % 500) == Mixture(weights, total).at(start % 500)  # and backwards


def test_mixture_is_fixed_for_ever() -> None:
    """A change here would change every run that is resumed with a newer version."""
    constant = Mixture([(Fraction(7), Fraction(7)), (Fraction(2),) * 2, (Fraction(1),) * 2])
    assert [constant.at(g)[0] for g in range(20)] == PINNED_CONSTANT
    ramp = Mixture([(Fraction(1), Fraction(0)), (Fraction(0), Fraction(1))], 20)
    assert [ramp.at(g)[0] for g in range(20)] == PINNED_RAMP


PINNED_CONSTANT = [0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 1, 0, 0, 2]
PINNED_RAMP = [0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1]


def test_a_block_is_spread_evenly() -> None:
    assert spread((2, 2)) == (0, 1, 0, 1)
    assert Counter(spread((250, 5, 1))) == {0: 250, 1: 5, 2: 1}
    rare = [g for g, source in enumerate(spread((250, 5, 1))) if source == 1]
    assert all(40 < b - a < 62 for a, b in pairwise(rare))


SIZES = [13, 7, 40]
RAMP = [
    (Fraction("0.7"), Fraction("0.7")),
    (Fraction("0.1"), Fraction("0.5")),
    (Fraction("0.2"), Fraction(0)),
]


@settings(max_examples=40, deadline=None)
@given(stops=st.lists(st.integers(1, 59), max_size=5), ranks=st.sampled_from([1, 2, 4]))
def test_resumes_and_ranks_do_not_change_the_samples(stops: list[int], ranks: int) -> None:
    """Oracle: one uninterrupted run in one process."""
    steps, per_step = 60, 8
    expected = list(RunSampler(SampleOrder(SIZES, 3, RAMP, steps * per_step), 8, steps, lambda: 0))
    places = [0, *sorted(set(stops)), steps]
    seen: list[int] = []
    for begin, end in pairwise(places):
        order = SampleOrder(SIZES, 3, RAMP, steps * per_step)  # a new process
        whole = list(RunSampler(order, per_step, steps, lambda begin=begin: begin))
        part = whole[: (end - begin) * per_step]
        shards = [part[rank::ranks] for rank in range(ranks)]
        seen += [i for together in zip(*shards, strict=True) for i in together]
    assert seen == expected


def test_every_source_reads_its_sequences_once_an_epoch() -> None:
    order = SampleOrder(SIZES, 3, RAMP, 480)
    bounds = [range(13), range(13, 20), range(20, 60)]
    samples = [order[g] for g in range(480)]
    for part, count in zip(bounds, order.read(480), strict=True):
        own = [i for i in samples if i in part]
        assert len(own) == count
        for epoch in range(0, count - len(part) + 1, len(part)):
            assert sorted(own[epoch : epoch + len(part)]) == list(part)


def test_negative_control_shuffled_shares_are_noticed() -> None:
    """The bound of 1 can fail: independent draws of the same weights break it."""
    import random

    draw = random.Random(0)
    counts, mixture, broken = [0, 0, 0], Mixture(RAMP, 480), False
    for g in range(480):
        counts[draw.choices(range(3), [float(s) for s, _ in RAMP])[0]] += 1
        ideal = mixture.ideal(g + 1)
        broken |= any(abs(a - b) >= 2 for a, b in zip(counts, ideal, strict=True))
    assert broken


def test_position_beyond_a_changing_mixture() -> None:
    with pytest.raises(IndexError):
        Mixture(RAMP, 10).at(10)
