"""The exact split: a weight becomes two representable parts whose sum is the weight, bit for bit.

By Sterbenz' lemma w - a is representable whenever |w|/2 <= |a| <= |w| with the same sign. Every
step below rounds to nearest a number u w with 1/2 < u < 1. Rounding is monotone and both |w| and,
outside the subnormals, |w|/2 are representable, so the rounded a stays inside those bounds (among
subnormals every difference is representable). A block of bfloat16 takes about 3 ns a weight.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

# A random byte: one bit says who gets the larger part, seven give one of this many fractions.
# bfloat16 has no more than that between w/2 and w.
FRACTIONS = 128


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which weights of ``dtype`` are calculated."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def fraction_range(remaining: int) -> tuple[float, float]:
    """(lowest, step) of the ``FRACTIONS`` equally likely parts that are left of a weight when one
    of ``remaining`` copies is split off; with two left, that is the larger part."""
    mean = (remaining - 1) / remaining if remaining > 2 else 0.75
    half_width = min(mean - 0.5, 1.0 - mean)
    step = 2 * half_width / FRACTIONS
    # Centres of equal intervals: symmetric around the mean, never 1/2 or 1.
    return mean - half_width + step / 2, step


def split(weights: Array, remaining: int, random: Bytes) -> tuple[Array, Array]:
    """Split off one of ``remaining`` copies: (rest, peeled), which sum to ``weights`` exactly.

    On average the peeled part is 1 / ``remaining`` of the weight. With two copies left, a random
    bit decides which of them gets the larger part.

    Args:
        weights: any shape; bfloat16, float16, float32 or float64.
        remaining: copies that still share this weight, at least 2.
        random: one random byte a weight, of the same shape.
    """
    lowest, step = fraction_range(remaining)
    if weights.dtype == ml_dtypes.bfloat16:
        large, small = _split_bfloat16(weights, lowest, step, random)
    else:
        large, small = _split_float(weights, lowest, step, random)
    if remaining > 2:
        return large, small
    large_bits, small_bits = _bits(large), _bits(small)
    # All ones or all zeros: exchanging bits is several times faster than numpy.where.
    chosen = -(random & np.uint8(1)).astype(large_bits.dtype)
    chosen &= large_bits ^ small_bits
    large_bits ^= chosen
    small_bits ^= chosen
    return large, small


def _bits(values: Array) -> Array:
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


def _split_float(weights: Array, lowest: float, step: float, random: Bytes) -> tuple[Array, Array]:
    wide = weights.astype(compute_dtype(weights.dtype))
    fraction = (random >> np.uint8(1)).astype(wide.dtype)
    fraction *= wide.dtype.type(step)
    fraction += wide.dtype.type(lowest)
    fraction *= wide
    large = fraction.astype(weights.dtype)
    wide -= large.astype(wide.dtype)
    return large, wide.astype(weights.dtype)


def _split_bfloat16(
    weights: Array, lowest: float, step: float, random: Bytes
) -> tuple[Array, Array]:
    """The same through bits: a bfloat16 is the upper half of a float32; casts are far slower."""
    pattern = weights.view(np.uint16).astype(np.uint32)
    pattern <<= np.uint32(16)
    wide = pattern.view(np.float32)
    product = (random >> np.uint8(1)).astype(np.float32)
    product *= np.float32(step)
    product += np.float32(lowest)
    product *= wide
    rounded = product.view(np.uint32)
    rounded += np.uint32(0x8000)
    rounded &= np.uint32(0xFFFF0000)
    wide -= product
    rounded >>= np.uint32(16)
    pattern >>= np.uint32(16)
    kind = weights.dtype
    return rounded.astype(np.uint16).view(kind), pattern.astype(np.uint16).view(kind)
