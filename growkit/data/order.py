"""The order of samples, as a pure function of seed and position.

Sample g of a run (g = 0, 1, ...) is sample k of one source (see :mod:`growkit.data.mixture`),
and that is sequence ``permutation(n, seed, k // n)[k % n]`` of the source's n: one Philox
permutation an epoch, keyed by seed, source and epoch. Step s with G sequences reads samples
``[s * G, (s + 1) * G)``. So a resumed run needs no replay and no saved sampler state, and a run
with another batch split or on another number of processes sees the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler

from growkit.data.mixture import Mixture


def permutation(n: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """The order of a source's n sequences in an epoch, int64 ``[n]``."""
    generator = np.random.Generator(np.random.Philox(key=[seed + (source << 32), epoch]))
    return generator.permutation(n)


class SampleOrder:
    """Which sequence stands at each position of a run; sequences of all sources are counted on.

    Args:
        sizes: sequences of each source.
        seed: below 2^32.
        weights: of each source at the first and the last sample; None for a single source.
        total: samples of the whole run, for weights that change.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        weights: Sequence[tuple[Fraction, Fraction]] | None = None,
        total: int | None = None,
    ) -> None:
        self.sizes, self.seed = list(sizes), seed
        self._starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        # Of the epoch that a source stands in.
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._mixture = Mixture(weights, total) if weights and len(self.sizes) > 1 else None

    def __getitem__(self, position: int) -> int:
        source, number = self._mixture.at(position) if self._mixture else (0, position)
        n = self.sizes[source]
        epoch, place = divmod(number, n)
        if self._orders.get(source, (None,))[0] != epoch:
            self._orders[source] = epoch, permutation(n, self.seed, epoch, source)
        return self._starts[source] + int(self._orders[source][1][place])

    def read(self, samples: int) -> list[int]:
        """How many of the first ``samples`` are of each source."""
        return self._mixture.counts(samples) if self._mixture else [samples]


class RunSampler(Sampler[int]):
    """All samples of a run as one epoch, starting at the step that the trainer stands at.

    Args:
        steps_done: asked at the start of an iteration: the optimizer steps already taken.
        total_steps: where the run or its stage ends, counted from the first step of all: ``len``
            does not depend on a resume.
    """

    def __init__(
        self,
        order: SampleOrder,
        sequences_per_step: int,
        total_steps: int,
        steps_done: Callable[[], int],
    ) -> None:
        self.order = order
        self.sequences_per_step, self.total_steps = sequences_per_step, total_steps
        self.steps_done = steps_done

    def __len__(self) -> int:
        return self.total_steps * self.sequences_per_step

    def __iter__(self) -> Iterator[int]:
        for position in range(self.steps_done() * self.sequences_per_step, len(self)):
            yield self.order[position]
