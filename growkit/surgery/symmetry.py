"""How the copies of a unit share its outgoing weight: ``split``, ``even``, ``noise`` or ``rms``.

* ``split``: every weight w becomes a and w - a, both representable, so that a + b == w bit for bit
  (see below). The fraction is random per entry, so copies get different gradients from the first
  step on. More than two copies are peeled off one at a time.
* ``even``: w / n each. Lossless when n is a power of two, else rounded. Copies get equal gradients
  and stay equal for ever.
* ``rms``: w / n each, so that no activation changes its root mean square by growth of a whole
  multiple. The weights are symmetric; the optimizer breaks the symmetry: moments of the further
  copies are reset (``optimizer_state`` is ``reset-new`` unless another is asked for) and the rate
  of new slots alone warms up again (``training.new_warmup_steps``). After SPARKLING (arXiv
  2602.02472, abstract), whose own formulas were not at hand.
* ``noise``: w / n plus noise that sums to zero over the copies, ``noise_snr_db`` decibels below the
  weights of its row (HyperCloning, arXiv 2409.12903). Rounded to the stored dtype.

Randomness is keyed by seed, tensor name and position, never by thread or shard.

By Sterbenz' lemma w - a is representable whenever |w|/2 <= |a| <= |w| with the same sign. Every
step of the split rounds to nearest a number u w with 1/2 < u < 1. Rounding is monotone and both |w|
and, outside the subnormals, |w|/2 are representable, so the rounded a stays inside those bounds
(among subnormals every difference is representable). A block of bfloat16 takes about 3 ns a weight.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from growkit.core.errors import UsageError, nearest
from growkit.surgery.operators import SYMMETRIES

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


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

    @property
    def equal(self) -> bool:
        """Copies begin equal, and with equal shares."""
        return self.mode in ("even", "rms")

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
    weights: Array,
    copies: int,
    symmetry: Symmetry,
    name: str,
    position: int,
    out: Sequence[Array] | None = None,
) -> Sequence[Array]:
    """Share a block of weights among ``copies`` readers.

    Args:
        weights: block [rows, columns] in the checkpoint's dtype; for ``split`` of any shape.
        copies: number of copies, at least 1.
        symmetry: how.
        name: name of the written tensor, part of the random key.
        position: index of the block in the tensor, part of the random key.
        out: where ``split`` writes them, ``copies`` arrays of that shape and dtype; absent: new
            ones. No other mode looks at it.

    Returns:
        ``copies`` arrays of the same shape and dtype; with ``split`` they sum to ``weights``
        exactly.
    """
    if copies == 1:
        return [weights]
    if symmetry.equal:
        return [_even(weights, copies)] * copies
    if symmetry.mode == "noise":
        bits = random_bits(symmetry.seed, name, position, weights.size * copies)
        return _noisy(weights, copies, symmetry, bits.reshape(copies, *weights.shape))
    count = weights.size * (copies - 1)
    drawn = random_bits(symmetry.seed, name, position, (count + 1) // 2).view(np.uint8)
    drawn = drawn[:count].reshape(copies - 1, *weights.shape)
    result = [np.empty_like(weights) for _ in range(copies)] if out is None else out
    rest = weights
    for place, random in enumerate(drawn):
        left = result[-1] if place == copies - 2 else np.empty_like(weights)
        split(rest, copies - place, random, (left, result[place]))
        rest = left
    return result


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


# -- the exact split -------------------------------------------------------------------------------

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


def split(
    weights: Array, remaining: int, random: Bytes, out: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Split off one of ``remaining`` copies: (rest, peeled), which sum to ``weights`` exactly.

    On average the peeled part is 1 / ``remaining`` of the weight. With two copies left, a random
    bit decides which of them gets the larger part.

    Args:
        weights: any shape; bfloat16, float16, float32 or float64.
        remaining: copies that still share this weight, at least 2.
        random: one random byte a weight, of the same shape.
        out: where to write (rest, peeled); absent: new arrays.
    """
    lowest, step = fraction_range(remaining)
    if weights.dtype == ml_dtypes.bfloat16:
        large, small = _split_bfloat16(weights, lowest, step, random)
    else:
        large, small = _split_float(weights, lowest, step, random)
    rest, peeled = out or (np.empty_like(weights), np.empty_like(weights))
    if remaining > 2:
        _bits(rest)[...], _bits(peeled)[...] = large, small
        return rest, peeled
    # All ones or all zeros: exchanging bits is several times faster than numpy.where.
    bits = large.dtype
    chosen = scratch.array("chosen", weights.shape, np.dtype(f"i{bits.itemsize}"))
    lowest_bit = scratch.array("byte", weights.shape, np.dtype(np.int8))
    np.bitwise_and(random.view(np.int8), np.int8(1), out=lowest_bit)
    np.negative(lowest_bit, out=lowest_bit)
    np.copyto(chosen, lowest_bit)
    exchanged = chosen.view(bits)
    difference = scratch.array("difference", weights.shape, bits)
    np.bitwise_xor(large, small, out=difference)
    exchanged &= difference
    np.bitwise_xor(large, exchanged, out=_bits(rest))
    np.bitwise_xor(small, exchanged, out=_bits(peeled))
    return rest, peeled


class Scratch(threading.local):
    """Arrays that one thread uses again and again: their pages stay mapped and in the cache, where
    new ones of this size are mapped anew each time, which costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of any content; the next one of this name is in the same place."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
        return buffer[:nbytes].view(dtype).reshape(shape)


scratch = Scratch()


def _bits(values: Array) -> Array:
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


def _fractions(
    shape: tuple[int, ...], kind: np.dtype[Any], lowest: float, step: float, random: Bytes
) -> Array:
    """The part of each weight that is split off, by the seven upper bits of a random byte."""
    fraction = scratch.array("fraction", shape, kind)
    upper = scratch.array("byte", shape, np.dtype(np.uint8))
    np.right_shift(random, np.uint8(1), out=upper)
    np.copyto(fraction, upper)
    fraction *= kind.type(step)
    fraction += kind.type(lowest)
    return fraction


def _split_float(weights: Array, lowest: float, step: float, random: Bytes) -> tuple[Array, Array]:
    """Bits of (larger part, smaller part), until the next call."""
    kind = compute_dtype(weights.dtype)
    part = _fractions(weights.shape, kind, lowest, step, random)
    rest = scratch.array("rest", weights.shape, kind)
    if weights.dtype == kind:
        part *= weights
        np.subtract(weights, part, out=rest)
        return _bits(part), _bits(rest)
    np.copyto(rest, weights)
    part *= rest
    large = part.astype(weights.dtype)
    np.copyto(part, large)
    rest -= part
    return _bits(large), _bits(rest.astype(weights.dtype))


def _split_bfloat16(
    weights: Array, lowest: float, step: float, random: Bytes
) -> tuple[Array, Array]:
    """The same through bits: a bfloat16 is the upper half of a float32; casts are far slower."""
    pattern = scratch.array("rest", weights.shape, np.dtype(np.uint32))
    np.copyto(pattern, weights.view(np.uint16))
    pattern <<= np.uint32(16)
    wide = pattern.view(np.float32)
    product = _fractions(weights.shape, wide.dtype, lowest, step, random)
    product *= wide
    rounded = product.view(np.uint32)
    rounded += np.uint32(0x8000)
    rounded &= np.uint32(0xFFFF0000)
    wide -= product
    halves = []
    for name, bits in (("large", rounded), ("small", pattern)):
        bits >>= np.uint32(16)
        half = scratch.array(name, bits.shape, np.dtype(np.uint16))
        np.copyto(half, bits, casting="unsafe")
        halves.append(half)
    return halves[0], halves[1]
