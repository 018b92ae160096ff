"""Calculated tensors that need no weight of the source."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.surgery.conversions.conversion import Array, Computed


def constant_rows(make: Callable[[], Array], like: str = "q") -> Computed:
    """The same small tensor in every layer, in the dtype of the role ``like``."""

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        return np.asarray(make()[first : first + count], np.float64)

    return Computed(rows, (like,))


def filled(shape: tuple[int, ...], value: float) -> Computed:
    """One number everywhere."""
    return constant_rows(lambda: np.full(shape, value))
