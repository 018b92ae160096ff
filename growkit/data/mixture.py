"""Which source each sample of a run is from: exact shares, as a pure function of its position.

Weights are normalized at the first and at the last step, and the share of a source goes linearly
from the one to the other; F_i(g) is its integral, the number of samples that source i would have
had after g samples if samples could be split.

Samples are counted in blocks. At the end of every block, source i has had floor(F_i) or ceil(F_i)
samples: the k-th sample of a source has to come between the moments at which F_i passes k and
k + 1, and of the sources that may have one more, those go first whose moment comes first (earliest
deadline first, which meets all deadlines here because fractional samples would; compare Tijdeman,
"The chairman assignment problem", 1980). Within a block the same rule spreads the samples of each
source evenly. So counts are within 1 of their ideal at the end of each block and within 2 anywhere.

Nothing is random and nothing is replayed. Counts at a block's end depend on those before it, which
costs a microsecond or two a block and source, once; with constant weights the counts are exact
every few blocks, and the reckoning starts there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

BLOCK = 256


def next_counts(
    counts: Sequence[int],
    ideal: Sequence[Fraction],
    total: int,
    deadline: Callable[[int, int], float],
) -> list[int]:
    """Whole counts that sum to ``total``, each the floor or the ceiling of its ideal.

    Args:
        counts: at the end of the block before.
        deadline: (source, count) -> when the ideal of the source reaches that count.
    """
    new = [max(count, math.floor(value)) for count, value in zip(counts, ideal, strict=True)]
    more = [i for i, value in enumerate(ideal) if new[i] < value]
    more.sort(key=lambda i: (deadline(i, new[i] + 1), i))
    for i in more[: total - sum(new)]:
        new[i] += 1
    return new


@lru_cache(maxsize=256)
def spread(counts: tuple[int, ...]) -> tuple[int, ...]:
    """A block that holds each source ``counts[i]`` times, as evenly as can be."""
    total, done = sum(counts), [0] * len(counts)
    order = []
    for g in range(1, total + 1):
        ideal = [Fraction(count * g, total) for count in counts]
        new = next_counts(done, ideal, g, lambda i, k: k * total / counts[i])
        order += [i for i, (a, b) in enumerate(zip(done, new, strict=True)) if b > a]
        done = new
    return tuple(order)


class Mixture:
    """Shares of sources that change linearly over the run.

    Args:
        weights: of each source, at the first and at the last sample; any positive scale.
        total: samples of the whole run (not needed for constant weights).
    """

    def __init__(
        self, weights: Sequence[tuple[Fraction, Fraction]], total: int | None = None
    ) -> None:
        sums = [sum((pair[end] for pair in weights), Fraction(0)) for end in (0, 1)]
        self.shares = [(first / sums[0], last / sums[1]) for first, last in weights]
        self.constant = all(first == last for first, last in self.shares)
        if self.constant:
            self.block, self.total = BLOCK, None
            # After so many blocks every ideal is a whole number, and so the counts are.
            parts = [(share * BLOCK).denominator for share, _ in self.shares]
            self.period = math.lcm(*parts)
        else:
            assert total is not None, "weights that change need the length of the run"
            # Within a block shares stand still: short blocks in a short run.
            self.block = max(1, min(BLOCK, math.isqrt(total) // 2))
            self.total, self.period = total, 0
        # Counts at the ends of the blocks from ``_first`` on.
        self._first, self._counts = 0, [[0] * len(self.shares)]

    def ideal(self, g: int) -> list[Fraction]:
        """F_i(g): shares of g samples, exactly."""
        if self.total is None:
            return [first * g for first, _ in self.shares]
        ramp = Fraction(g * g, 2 * self.total)
        return [first * g + (last - first) * ramp for first, last in self.shares]

    def _deadline(self, source: int, count: int) -> float:
        """The position at which the ideal of a source reaches a count; infinite if never."""
        first, last = map(float, self.shares[source])
        if self.total is None:
            return count / first
        bend = (last - first) / (2 * self.total)
        root = first * first + 4 * bend * count
        if root < 0 or first + math.sqrt(root) == 0:
            return math.inf
        return 2 * count / (first + math.sqrt(root))

    def _at_block(self, number: int) -> list[int]:
        """Samples of each source in the first ``number`` blocks."""
        if self.period and not self._first <= number < self._first + len(self._counts) + 4096:
            self._first = number - number % self.period
            self._counts = [[int(value) for value in self.ideal(self._first * self.block)]]
        while len(self._counts) <= number - self._first:
            end = (self._first + len(self._counts)) * self.block
            end = end if self.total is None else min(end, self.total)
            self._counts.append(next_counts(self._counts[-1], self.ideal(end), end, self._deadline))
        return self._counts[number - self._first]

    def at(self, position: int) -> tuple[int, int]:
        """(source, how many samples of that source came before) of the sample at a position."""
        number, within = divmod(position, self.block)
        if self.total is not None and position >= self.total:
            raise IndexError(position)
        before, after = self._at_block(number), self._at_block(number + 1)
        order = spread(tuple(b - a for a, b in zip(before, after, strict=True)))
        source = order[within]
        return source, before[source] + order[:within].count(source)

    def counts(self, position: int) -> list[int]:
        """Samples of each source before a position."""
        number, within = divmod(position, self.block)
        before = list(self._at_block(number))
        if within:
            after = self._at_block(number + 1)
            order = spread(tuple(b - a for a, b in zip(before, after, strict=True)))
            for source in order[:within]:
                before[source] += 1
        return before
