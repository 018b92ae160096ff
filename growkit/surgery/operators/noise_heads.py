"""Noise heads: the baseline that copies only the subtracted maps.

Down to ratio 1:1 each group is cut into smaller groups with a copy of the noise head of their own::

    [s0 s1 s2 s3 | n0]   ->   [s0 s1 | n0] [s2 s3 | n0]                          (x2, bit-exact)

Below 1:1 a signal head subtracts the sum of m copies, so lambda is divided by m (exact up to the
rounding of the lambda vectors): ``e^a' - e^b' + lambda_init = lambda / m`` is solved for one of the
two exponents, and lambda_init stays (docs/algebra.md section 7, with D = lambda / m - lambda).

The m copies have equal rows and one lambda, so they get equal gradients and stay equal: no split of
their rows keeps a sum of softmaxes. ``--symmetry noise`` parts them, and changes the function.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from growkit.core.errors import UsageError
from growkit.families.differential import divisors, signal_to_noise
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, require_axis
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class NoiseHeads:
    """Grow the noise heads to ``amount``; signal heads and keys stay.

    Attributes:
        amount: factor, increment or new total of noise heads.
    """

    axis: ClassVar[str] = "noise_head"
    amount: Amount

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "noise_head", "--noise-heads")
        signal, noise = shape.sizes["signal_head"], shape.sizes["noise_head"]
        asked = self.amount.exact(noise)
        if asked >= noise and not _fits(asked, signal, noise):
            possible = [n for n in range(noise + 1, signal + 1) if not signal % n and not n % noise]
            below = ", ".join(str(n) for n in possible)
            raise UsageError(
                f"--noise-heads {self.amount.text} asks for {float(asked):g} noise heads, which "
                f"does not divide {signal} signal heads into groups with one old noise head each.",
                f"Possible: {below + ', ' if below else ''}or a multiple of {max(signal, noise)} "
                f"(the divisors of {signal} are {divisors(signal)}).",
            )
        target = self.amount.resolve(noise, "--noise-heads", "noise heads")
        old_links = signal_to_noise(shape.sizes)
        new_links = signal_to_noise({**shape.sizes, "noise_head": target})
        copies = new_links.shape[1] // old_links.shape[1]
        source = np.empty(target, dtype=np.int64)
        source[new_links] = np.repeat(old_links, copies, axis=1)
        return Effect(
            operator="noise_heads",
            summary=f"noise heads {noise} -> {target}, signal heads {signal} unchanged"
            + (f", lambda divided by {copies}" if copies > 1 else ""),
            axes={"noise_head": AxisMap(source, noise)},
            noise_copies=copies,
            exactness=Exactness.BIT_EXACT if copies == 1 else Exactness.EXACT,
            reason="every signal head keeps a copy of its noise map"
            + ("; lambda is divided by the number of copies it subtracts" if copies > 1 else ""),
        )


def _fits(target: Fraction, signal: int, noise: int) -> bool:
    """Groups of ``signal`` heads stay even; kv pairs divide ``noise`` and with it the target."""
    if target > signal:
        return target % max(signal, noise) == 0
    return target % noise == 0 and signal % target == 0


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> NoiseHeads:
    return NoiseHeads(amount)
