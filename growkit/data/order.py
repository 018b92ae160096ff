"""The order of samples, as a pure function of seed and position.

Sample g of a run (g = 0, 1, ...) is sample k of one source (see :mod:`growkit.data.mixture`),
and that is sequence ``permutation(n, seed, k // n)[k % n]`` of the source's n: one Philox
permutation an epoch, keyed by seed, source and epoch. Step s with G sequences reads samples
``[s * G, (s + 1) * G)``. So a resumed run needs no replay and no saved sampler state, and a run
with another batch split or on another number of processes sees the same sequences. A run that goes
on where another one stood, or with appended text, starts from the :class:`SourcePlace` of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
from torch.utils.data import Sampler

from growkit.data.mixture import Mixture


def permutation(n: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """The order of a source's n sequences in an epoch, int64 ``[n]``."""
    generator = np.random.Generator(np.random.Philox(key=[seed + (source << 32), epoch]))
    return generator.permutation(n)


@dataclass(frozen=True)
class SourcePlace:
    """Where a source stands: how much of it was read, in which order.

    Attributes:
        seed, number: of its permutations; a run that goes on from another one keeps them.
        read: samples that were taken from it.
        sizes: (samples read, sequences) whenever the number of its sequences changed, the first
            with 0: sequences were appended, and those before kept their numbers.
    """

    seed: int
    number: int
    read: int
    sizes: tuple[tuple[int, int], ...]


class SourceOrder:
    """The sequences of one source, sample by sample.

    Where sequences were appended inside an epoch, those that it had not read yet and the new ones
    are shuffled together and end that epoch: nothing is read twice before all was read.
    """

    def __init__(self, seed: int, number: int, sizes: Sequence[tuple[int, int]]) -> None:
        self.seed, self.number = seed, number
        self._cached: tuple[int, int] | None = None
        self._order = np.empty(0, np.int64)
        # (first sample, the rest of an epoch that was enlarged, the epoch behind it, sequences)
        self._phases = [(0, np.empty(0, np.int64), 0, sizes[0][1])]
        for (_, before), (read, n) in pairwise(sizes):
            rest, epoch = self._unread(read)
            if len(rest):
                rest = np.concatenate([rest, np.arange(before, n)])
                rest = rest[permutation(len(rest), seed, epoch, number)]
            self._phases.append((read, rest, epoch, n))

    def __getitem__(self, sample: int) -> int:
        first, rest, epoch, n = next(p for p in reversed(self._phases) if p[0] <= sample)
        place = sample - first
        if place < len(rest):
            return int(rest[place])
        more, place = divmod(place - len(rest), n)
        return int(self._epoch(n, epoch + more)[place])

    def _epoch(self, n: int, epoch: int) -> np.ndarray:
        if self._cached != (n, epoch):
            self._cached = n, epoch
            self._order = permutation(n, self.seed, epoch, self.number)
        return self._order

    def _unread(self, sample: int) -> tuple[np.ndarray, int]:
        """What the epoch of a sample has left from there on, and the epoch behind it."""
        first, rest, epoch, n = self._phases[-1]
        place = sample - first
        if place < len(rest):
            return rest[place:], epoch
        more, place = divmod(place - len(rest), n)
        if place == 0:
            return np.empty(0, np.int64), epoch + more
        return self._epoch(n, epoch + more)[place:], epoch + more + 1


class SampleOrder:
    """Which sequence stands at each position of a run; sequences of all sources are counted on.

    Args:
        sizes: sequences of each source.
        seed: below 2^32.
        weights: of each source at the first and the last sample; None for a single source.
        total: samples of the whole run, for weights that change.
        places: where each source stood at the position ``begin``, read by the run so far or by the
            run that this one goes on from.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        weights: Sequence[tuple[Fraction, Fraction]] | None = None,
        total: int | None = None,
        *,
        places: Sequence[SourcePlace] | None = None,
        begin: int = 0,
    ) -> None:
        self.sizes, self.begin = list(sizes), begin
        self._starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self._mixture = Mixture(weights, total) if weights and len(self.sizes) > 1 else None
        self._places = list(
            places or [SourcePlace(seed, i, 0, ((0, n),)) for i, n in enumerate(self.sizes)]
        )
        self._sources = [SourceOrder(p.seed, p.number, p.sizes) for p in self._places]
        # Samples of each source that the positions before ``begin`` would have.
        self._before = self._counts(begin) if begin else [0] * len(self.sizes)

    def __getitem__(self, position: int) -> int:
        source, number = self._mixture.at(position) if self._mixture else (0, position)
        number += self._places[source].read - self._before[source]
        return self._starts[source] + self._sources[source][number]

    def _counts(self, samples: int) -> list[int]:
        return self._mixture.counts(samples) if self._mixture else [samples]

    def read(self, samples: int) -> list[int]:
        """How many of the first ``samples`` are of each source."""
        parts = zip(self._counts(samples), self._before, self._places, strict=True)
        return [n - before + (place.read if self.begin else 0) for n, before, place in parts]

    def places(self, samples: int) -> list[SourcePlace]:
        """Where each source stands behind the first ``samples`` (at least ``begin``)."""
        parts = zip(self._counts(samples), self._before, self._places, strict=True)
        return [replace(p, read=p.read + n - before) for n, before, p in parts]


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
