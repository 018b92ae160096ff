"""The order of samples is a pure function of seed and step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.data.order import RunSampler, SampleOrder, permutation

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
