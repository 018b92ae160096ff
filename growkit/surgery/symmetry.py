"""How the copies of a unit share its outgoing weight: ``split``, ``even`` or ``noise``.

* ``split``: every weight w becomes a and w - a, both representable, so that a + b == w bit for bit.
  By Sterbenz' lemma w - a is exact whenever |w|/2 <= |a| <= |w|; the fraction is random per
  entry, so copies get different gradients from the first step on. More than two copies are peeled
  off one at a time, every step inside the same bounds.
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

import ml_dtypes
import numpy as np
import numpy.typing as npt

from growkit.errors import UsageError, nearest

Array = npt.NDArray[Any]
MODES = ("split", "even", "noise")


@dataclass(frozen=True)
class Symmetry:
    """Choice of shares for all copied axes of a plan.

    Attributes:
        mode: one of ``MODES``.
        noise_snr_db: signal-to-noise ratio in decibels, for ``noise``.
        seed: of all randomness of the plan.
    """

    mode: str = "split"
    noise_snr_db: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                f"--symmetry {self.mode!r} is not known.",
                f"{nearest(self.mode, MODES)}Valid values: {', '.join(MODES)}.",
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
    draws = copies if symmetry.mode == "noise" else copies - 1
    bits = random_bits(symmetry.seed, name, position, weights.size * draws)
    drawn = bits.reshape(draws, *weights.shape)
    if symmetry.mode == "noise":
        return _noisy(weights, copies, symmetry, drawn)
    result = []
    rest = weights
    for remaining in range(copies, 1, -1):
        rest, peeled = _split(rest, remaining, drawn[copies - remaining])
        result.append(peeled)
    return [*result, rest]


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which weights of ``dtype`` are calculated."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def _even(weights: Array, copies: int) -> Array:
    wide = weights.astype(compute_dtype(weights.dtype))
    return (wide / wide.dtype.type(copies)).astype(weights.dtype)


def _split(weights: Array, remaining: int, bits: npt.NDArray[np.uint16]) -> tuple[Array, Array]:
    """Split off one of ``remaining`` copies: (rest, peeled), which sum to ``weights`` exactly.

    The larger part is at least half of the weight. With two copies left, a random bit decides
    which of them gets it.
    """
    mean = (remaining - 1) / remaining if remaining > 2 else 0.75
    half_width = min(mean - 0.5, 1.0 - mean)
    lowest, width = mean - half_width, 2 * half_width
    if weights.dtype == ml_dtypes.bfloat16:
        large, small = _split_bfloat16(weights, lowest, width, bits)
    else:
        wide = weights.astype(compute_dtype(weights.dtype))
        fraction = (bits >> 1).astype(wide.dtype)
        fraction *= wide.dtype.type(width / 32767.0)
        fraction += wide.dtype.type(lowest)
        large = (wide * fraction).astype(weights.dtype)
        small = (wide - large.astype(wide.dtype)).astype(weights.dtype)
    if remaining > 2:
        return large, small
    swap = (bits & 1).astype(bool)
    return np.where(swap, small, large), np.where(swap, large, small)


def _split_bfloat16(
    weights: Array, lowest: float, width: float, bits: npt.NDArray[np.uint16]
) -> tuple[Array, Array]:
    """The split of bfloat16 through its bits: several times faster than casting."""
    pattern = weights.view(np.uint16).astype(np.uint32)
    pattern <<= np.uint32(16)
    wide = pattern.view(np.float32)
    product = (bits >> np.uint16(1)).astype(np.float32)
    product *= np.float32(width / 32767.0)
    product += np.float32(lowest)
    product *= wide
    # Truncating |w| * u could fall below |w| / 2; adding half a unit first rounds to nearest.
    rounded = product.view(np.uint32)
    rounded += np.uint32(0x8000)
    rounded &= np.uint32(0xFFFF0000)
    large = rounded.view(np.float32)
    wide -= large
    large_bits, small_bits = (rounded >> 16), (pattern >> 16)
    kind = np.dtype(ml_dtypes.bfloat16)
    return large_bits.astype(np.uint16).view(kind), small_bits.astype(np.uint16).view(kind)


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
