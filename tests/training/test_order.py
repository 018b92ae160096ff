"""The order of samples is a pure function of seed and step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.training.order import RunSampler, batch_at, permutation, sample_at

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
        return list(RunSampler(n, seed, per_step, total, lambda: done))

    assert sampler(0)[start * per_step :] == sampler(start)
    batches = [batch_at(step, per_step, n, seed) for step in range(total)]
    assert [i for batch in batches for i in batch] == sampler(0)


@settings(max_examples=40, deadline=None)
@given(n=Small, seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_every_epoch_reads_every_sequence_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(sample_at(epoch * n + i, n, seed) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_matter(other: dict[str, int]) -> None:
    base = {"n": 100, "seed": 0, "epoch": 0}
    assert permutation(**base).tolist() != permutation(**{**base, **other}).tolist()


def test_batch_split_does_not_matter() -> None:
    """4 sequences a step are the same ones, however many are in a micro-batch."""
    whole = list(RunSampler(50, 3, 4, 10, lambda: 0))
    assert whole == [i for step in range(10) for i in batch_at(step, 4, 50, 3)]
    assert len(RunSampler(50, 3, 4, 10, lambda: 7)) == 40
