"""The order of samples, as a pure function of seed and step.

Sample g of a run (g = 0, 1, ...) is ``permutation(n, seed, g // n)[g % n]``: one Philox permutation
of the n sequences an epoch, keyed by (seed, epoch). Step s with G sequences a step reads samples
``[s * G, (s + 1) * G)``. So a resumed run needs no replay and no saved sampler state, and a run
with another batch split of the same G sees the same sequences at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n sequences in an epoch, int64 ``[n]``."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def sample_at(position: int, n: int, seed: int) -> int:
    """The sequence that is read at a position of the run."""
    return int(permutation(n, seed, position // n)[position % n])


def batch_at(step: int, sequences_per_step: int, n: int, seed: int) -> list[int]:
    """The sequences of one optimizer step."""
    first = step * sequences_per_step
    return [sample_at(g, n, seed) for g in range(first, first + sequences_per_step)]


class RunSampler(Sampler[int]):
    """All samples of a run as one epoch, starting at the step that the trainer stands at.

    Args:
        steps_done: asked at the start of an iteration: the optimizer steps already taken.
        total_steps: length of the whole run, so that ``len`` does not depend on a resume.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        sequences_per_step: int,
        total_steps: int,
        steps_done: Callable[[], int],
    ) -> None:
        self.n, self.seed = n, seed
        self.sequences_per_step, self.total_steps = sequences_per_step, total_steps
        self.steps_done = steps_done

    def __len__(self) -> int:
        return self.total_steps * self.sequences_per_step

    def __iter__(self) -> Iterator[int]:
        for position in range(self.steps_done() * self.sequences_per_step, len(self)):
            yield sample_at(position, self.n, self.seed)
