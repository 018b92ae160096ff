"""The index map of one dimension of one tensor, from its axis maps and the order of its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from growkit.errors import GrowkitError
from growkit.families.layout import IntArray, Units
from growkit.surgery.axis_map import NEW, AxisMap, copy_multiplicity, copy_rank

Run = tuple[int, int, int]


@dataclass(frozen=True)
class DimMap:
    """Where every unit of a written dimension comes from.

    Attributes:
        source: unit of the old dimension, or ``NEW``; shape [units].
        block: elements a unit.
        consumes: copies share the weight (True) or are equal (False).
        old_width: elements of the old dimension.
    """

    source: IntArray
    block: int
    consumes: bool
    old_width: int

    @property
    def width(self) -> int:
        """Elements of the written dimension."""
        return len(self.source) * self.block

    @cached_property
    def rank(self) -> IntArray:
        """Which copy of its source each unit is; shape [units]."""
        return copy_rank(self.source)

    @cached_property
    def multiplicity(self) -> IntArray:
        """How many copies its source has; 0 for new units. Shape [units]."""
        return copy_multiplicity(self.source)

    @cached_property
    def shares(self) -> bool:
        """Some weight is divided among copies."""
        return self.consumes and bool((self.multiplicity > 1).any())

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """(old element, written element, elements) of the longest runs that stay together.

        Runs with old element -1 are new.
        """
        return runs_of(self.source, self.block)

    @property
    def new_ranges(self) -> list[tuple[int, int]]:
        """[start, end) of written elements that are new units or further copies."""
        is_new = (self.source == NEW) | (self.rank > 0)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_new, [False]]).astype(np.int8)))
        return [(int(a) * self.block, int(b) * self.block) for a, b in edges.reshape(-1, 2)]


def runs_of(source: IntArray, block: int) -> tuple[Run, ...]:
    """Merge neighbouring units that stay neighbours; see :attr:`DimMap.runs`."""
    if not len(source):
        return ()
    expected = np.where(source[:-1] == NEW, NEW, source[:-1] + 1)
    starts = np.concatenate([[0], np.flatnonzero(source[1:] != expected) + 1])
    lengths = np.diff(np.append(starts, len(source)))
    return tuple(
        (int(source[s]) * block if source[s] != NEW else NEW, int(s) * block, int(n) * block)
        for s, n in zip(starts, lengths, strict=True)
    )


def map_dim(old: Units, new: Units, axes: Mapping[str, AxisMap], consumes: bool) -> DimMap | None:
    """The map from a dimension laid out as ``old`` to one laid out as ``new``.

    Returns None when nothing moves.
    """
    if old.block != new.block:
        raise GrowkitError(f"a unit of {old.block} elements cannot become one of {new.block}")
    positions = _positions(old)
    source = np.full(len(new), NEW, dtype=np.int64)
    for code, axis in enumerate(new.axes):
        here = new.axis == code
        index = new.index[here]
        if axis in axes:
            index = axes[axis].source[index]
        table = positions[axis]
        found = np.where(index == NEW, NEW, table[new.part[here], np.maximum(index, 0)])
        source[here] = found
    if len(old) == len(new) and bool((source == np.arange(len(new))).all()):
        return None
    return DimMap(source, new.block, consumes, old.width)


def _positions(units: Units) -> dict[str, IntArray]:
    """Axis name -> table [part, index] of positions."""
    tables = {}
    for code, axis in enumerate(units.axes):
        here = np.flatnonzero(units.axis == code)
        parts, indices = units.part[here], units.index[here]
        table = np.full((parts.max() + 1, indices.max() + 1), NEW, dtype=np.int64)
        table[parts, indices] = here
        tables[axis] = table
    return tables
