"""The order of samples is a pure function of seed and step."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.data.order import RunSampler, SampleOrder, SourcePlace, permutation

Small = st.integers(1, 20)
PINNED = ([7, 1, 3, 2, 6, 5, 0, 4], [1, 7, 4, 0, 3, 2, 6, 5])


def test_order_is_fixed_for_ever() -> None:
    """A change here would change every run that is resumed with a newer version."""
    assert permutation(8, 7, 0).tolist() == PINNED[0]
    assert permutation(8, 7, 1).tolist() == PINNED[1]


@settings(max_examples=60, deadline=None)
@given(n=Small, seed=st.integers(0, 2**32 - 1), per_step=Small, start=Small, more=Small)
def test_resumed_sampler_yields_the_rest(
    n: int, seed: int, per_step: int, start: int, more: int
) -> None:
    total = start + more

    def sampler(done: int) -> list[int]:
        return list(RunSampler(SampleOrder([n], seed), per_step, total, lambda: done))

    assert sampler(0)[start * per_step :] == sampler(start)


@settings(max_examples=40, deadline=None)
@given(n=Small, seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_every_epoch_reads_every_sequence_once(n: int, seed: int, epoch: int) -> None:
    order = SampleOrder([n], seed)
    assert sorted(order[epoch * n + i] for i in range(n)) == list(range(n))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"source": 1}])
def test_seed_epoch_and_source_matter(other: dict[str, int]) -> None:
    base = {"n": 100, "seed": 0, "epoch": 0}
    assert permutation(**base).tolist() != permutation(**{**base, **other}).tolist()


def test_batch_split_does_not_matter() -> None:
    """4 sequences a step are the same ones as twice as many steps of 2 read."""
    order = SampleOrder([50], 3)
    whole = list(RunSampler(order, 4, 10, lambda: 0))
    assert whole == list(RunSampler(order, 2, 20, lambda: 0))
    assert len(RunSampler(order, 4, 10, lambda: 7)) == 40


@settings(max_examples=60, deadline=None)
@given(n=Small, more=Small, read=st.integers(0, 60))
def test_appended_sequences_join_the_epoch_that_is_being_read(n: int, more: int, read: int) -> None:
    """Old samples keep their order; nothing is read again before everything was read."""
    before = SampleOrder([n], 3)
    old = [before[g] for g in range(read)]
    (place,) = before.places(read)
    grown = replace(place, sizes=(*place.sizes, (read, n + more)))
    after = SampleOrder([n + more], 3, places=[grown], begin=read)
    done = old[read - read % n :]
    unread = n + more - (len(done) if read % n else 0)
    following = [after[g] for g in range(read, read + unread)]
    assert sorted(following + (done if read % n else [])) == list(range(n + more))
    assert sorted(after[read + unread + i] for i in range(n + more)) == list(range(n + more))
    assert after.read(read + 5) == [read + 5]


def test_run_goes_on_where_another_one_stood() -> None:
    """Also a run that went on itself, of another step size, in another mixture."""
    whole = SampleOrder([50], 3)
    first = SampleOrder([50], 9, places=whole.places(20))
    assert [first[g] for g in range(40)] == [whole[20 + g] for g in range(40)]
    second = SampleOrder([50], 11, places=first.places(15))
    assert [second[g] for g in range(40)] == [whole[35 + g] for g in range(40)]
    mixed = SampleOrder(
        [50, 10], 11, [(Fraction(1), Fraction(1))] * 2,
        places=[*first.places(15), SourcePlace(11, 1, 0, ((0, 10),))],
    )  # fmt: skip
    found = [mixed[g] for g in range(20)]
    assert [i for i in found if i < 50] == [whole[35 + g] for g in range(10)]
    assert len({i for i in found if i >= 50}) == 10
