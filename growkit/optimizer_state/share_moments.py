"""Mean squares of the shares that the symmetry hands to the copies of a unit.

The gradient of a copied producer is a sum over its readers, each weighted by its share s. Where
shares differ from entry to entry only their law is of use: E[s] scales the first moment and E[s^2]
the second (growth.md section 10). The shares of a unit's own readers would give nothing more: their
mean deviates from E[s] by 1 / sqrt(hidden_size).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from growkit.surgery.split import FRACTIONS, fraction_range
from growkit.surgery.symmetry import Symmetry

Floats = npt.NDArray[np.float64]


def mean_squares(copies: int, symmetry: Symmetry) -> Floats:
    """E[s^2] of every copy of a unit, in the order of :func:`growkit.surgery.symmetry.shares`.

    E[s] is 1 / copies in every mode. Shape [copies].
    """
    even = np.full(copies, copies**-2.0)
    if copies == 1 or symmetry.mode == "even":
        return even
    if symmetry.mode == "noise":
        # The noise of a share has the power of the share, lowered by the signal-to-noise ratio.
        return even * (1.0 + 10.0 ** (-symmetry.noise_snr_db / 10.0))
    squares, rest = [], 1.0
    for remaining in range(copies, 1, -1):
        lowest, step = fraction_range(remaining)
        kept = lowest + step * np.arange(FRACTIONS)
        kept_square, peeled_square = float(np.mean(kept**2)), float(np.mean((1 - kept) ** 2))
        if remaining == 2:  # a coin decides which of the two gets the larger part
            last = (kept_square + peeled_square) / 2
            squares += [rest * last, rest * last]
        else:
            squares.append(rest * peeled_square)
            rest *= kept_square
    return np.array(squares)
