"""The values of a grown moment, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import numpy.typing as npt

from growkit.optimizer_state.rules import DimRule, StateRule
from growkit.optimizer_state.source import SECOND_MOMENTS, Array
from growkit.surgery.axis_map import NEW
from growkit.surgery.symmetry import compute_dtype

BLOCK_ELEMENTS = 1 << 20


def grown_blocks(
    moment: Array, kind: str, rule: StateRule, *, reset_new: bool = False
) -> Iterator[tuple[int, Array]]:
    """(first element, block) of the written moment, in order; blocks are contiguous rows.

    Args:
        moment: old values, shape of the old parameter.
        kind: torch's name of it; tells first from second moments.
        rule: of the written parameter.
        reset_new: further copies begin with zero moments too (the first copy keeps its part).
    """
    squared = kind in SECOND_MOMENTS
    shape = rule.tensor.output.shape
    if not shape:
        yield 0, np.asarray(moment * (rule.square if squared else rule.mean))
        return
    wide = compute_dtype(moment.dtype)
    scale = wide.type(rule.square if squared else rule.mean)
    maps = [_elements(dim, squared, reset_new) for dim in rule.dims]
    width = prod(shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        block = moment[rows] if maps[0] is None else moment[maps[0][0][rows]]
        for axis, mapped in enumerate(maps[1:], start=1):
            if mapped is not None:
                block = np.take(block, mapped[0], axis=axis)
        block = block.astype(wide)
        for axis, mapped in enumerate(maps):
            if mapped is not None:
                factors = mapped[1][rows] if axis == 0 else mapped[1]
                block *= factors.astype(wide).reshape([-1] + [1] * (len(shape) - axis - 1))
        if scale != 1:
            block *= scale
        yield first * width, np.ascontiguousarray(block.astype(moment.dtype))


def _elements(
    dim: DimRule | None, squared: bool, reset_new: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """Old element and factor of every written element of a dimension."""
    if dim is None:
        return None
    units, block = dim.map, dim.map.block
    factors = dim.square if squared else dim.mean
    if reset_new:
        factors = np.where(units.rank > 0, 0.0, factors)
    # A new unit reads something that exists, times zero.
    first = np.where(units.source == NEW, 0, units.source) * block
    elements = (first[:, None] + np.arange(block)).reshape(-1)
    return elements, np.repeat(np.where(units.source == NEW, 0.0, factors), block)
