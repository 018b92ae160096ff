"""How the copies of a unit share its outgoing weight: ``split``, ``even`` or ``noise``.

* ``split``: every weight w becomes a and w - a, both representable, so that a + b == w bit for bit
  (:mod:`growkit.surgery.exact_split`). The fraction is random per entry, so copies get different
  gradients from the first step on. More than two copies are peeled off one at a time.
* ``even``: w / n each. Lossless when n is a power of two, else rounded. Copies get equal gradients
  and stay equal for ever.
* ``noise``: w / n plus noise that sums to zero over the copies, ``noise_snr_db`` decibels below the
  weights of its row (HyperCloning, arXiv 2409.12903). Rounded to the stored dtype.

Randomness is keyed by seed, tensor name and position, never by thread or shard.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.core.errors import UsageError, nearest
from growkit.surgery.exact_split import compute_dtype, split
from growkit.surgery.operators import SYMMETRIES

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Symmetry:
    """Choice of shares for all copied axes of a plan.

    Attributes:
        mode: one of ``SYMMETRIES``.
        noise_snr_db: signal-to-noise ratio in decibels, for ``noise``.
        seed: of all randomness of the plan.
    """

    mode: str = "split"
    noise_snr_db: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in SYMMETRIES:
            raise UsageError(
                f"--symmetry {self.mode!r} is not known.",
                f"{nearest(self.mode, SYMMETRIES)}Valid values: {', '.join(SYMMETRIES)}.",
            )
        if not math.isfinite(self.noise_snr_db):
            raise UsageError(
                f"--noise-snr-db {self.noise_snr_db} is not a number of decibels.",
                "Give a finite number; 10 is usual, larger is quieter.",
            )


def random_bits(seed: int, name: str, position: int, count: int) -> npt.NDArray[np.uint16]:
    """``count`` random 16-bit numbers for one block of one tensor."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    bits = np.random.Philox(
        key=np.frombuffer(key, np.uint64), counter=np.array([0, 0, position, 0], np.uint64)
    )
    words: npt.NDArray[np.uint64] = bits.random_raw((count + 3) // 4)
    return words.view(np.uint16)[:count]


def shares(
    weights: Array, copies: int, symmetry: Symmetry, name: str, position: int
) -> list[Array]:
    """Share a block of weights among ``copies`` readers.

    Args:
        weights: block [rows, columns] in the checkpoint's dtype.
        copies: number of copies, at least 1.
        symmetry: how.
        name: name of the written tensor, part of the random key.
        position: index of the block in the tensor, part of the random key.

    Returns:
        ``copies`` arrays of the same shape and dtype; with ``split`` they sum to ``weights``
        exactly.
    """
    if copies == 1:
        return [weights]
    if symmetry.mode == "even":
        return [_even(weights, copies)] * copies
    if symmetry.mode == "noise":
        bits = random_bits(symmetry.seed, name, position, weights.size * copies)
        return _noisy(weights, copies, symmetry, bits.reshape(copies, *weights.shape))
    count = weights.size * (copies - 1)
    drawn = random_bits(symmetry.seed, name, position, (count + 1) // 2).view(np.uint8)
    drawn = drawn[:count].reshape(copies - 1, *weights.shape)
    result = []
    rest = weights
    for remaining, random in zip(range(copies, 1, -1), drawn, strict=True):
        rest, peeled = split(rest, remaining, random)
        result.append(peeled)
    return [*result, rest]


def _even(weights: Array, copies: int) -> Array:
    wide = weights.astype(compute_dtype(weights.dtype))
    return (wide / wide.dtype.type(copies)).astype(weights.dtype)


def _noisy(
    weights: Array, copies: int, symmetry: Symmetry, bits: npt.NDArray[np.uint16]
) -> list[Array]:
    """Even shares plus uniform noise; its mean over the copies is taken off, so it sums to zero."""
    wide = weights.astype(compute_dtype(weights.dtype))
    share = wide / wide.dtype.type(copies)
    rms = np.sqrt(np.mean(np.square(share), axis=-1, keepdims=True))
    noise = bits.astype(wide.dtype) / wide.dtype.type(32767.5) - 1
    noise -= noise.mean(axis=0)
    unit_power = (3.0 * copies / (copies - 1)) ** 0.5
    noise *= rms * wide.dtype.type(unit_power * 10.0 ** (-symmetry.noise_snr_db / 20.0))
    return [(share + n).astype(weights.dtype) for n in noise]
