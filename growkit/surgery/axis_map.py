"""The one idea: growing an axis is an index map from new units to old ones.

A tensor that produces the axis copies the units named by ``source``; a tensor that reads it gives
each copy of one source a share of that source's weight, and the shares of one source sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from growkit.families.unit_layout import IntArray

NEW = -1


@dataclass(frozen=True)
class AxisMap:
    """Where every unit of a grown axis comes from.

    Attributes:
        source: old unit of each new unit, or ``NEW``; shape [new size].
        old_size: units before growth.
        partial: it is a conversion's, which may leave old units out; in growth every one occurs.
    """

    source: IntArray
    old_size: int
    partial: bool = False

    def __post_init__(self) -> None:
        known = self.source[self.source != NEW]
        if len(known) and (known.min() < 0 or known.max() >= self.old_size):
            raise ValueError("an axis map points outside the old axis")
        if not self.partial and len(np.unique(known)) != self.old_size:
            raise ValueError("growth has to keep every old unit")

    @property
    def new_size(self) -> int:
        return len(self.source)

    @cached_property
    def multiplicity(self) -> IntArray:
        """How many copies the source of each new unit has; 0 for new units. Shape [new size]."""
        return copy_multiplicity(self.source)

    @cached_property
    def rank(self) -> IntArray:
        """0 for the first copy of a source, 1 for the second ... Shape [new size]."""
        return copy_rank(self.source)

    @cached_property
    def share(self) -> npt.NDArray[np.float64]:
        """Expected part of the source's outgoing weight; 0 for new units. Shape [new size]."""
        return np.divide(
            1.0,
            self.multiplicity,
            out=np.zeros(self.new_size),
            where=self.multiplicity > 0,
        )

    def then(self, later: AxisMap) -> AxisMap:
        """The map of growing by ``self`` and then by ``later``."""
        if later.old_size != self.new_size:
            raise ValueError("axis maps do not fit together")
        source = np.where(later.source == NEW, NEW, self.source[later.source])
        return AxisMap(source, self.old_size, self.partial or later.partial)

    @staticmethod
    def identity(size: int) -> AxisMap:
        return AxisMap(np.arange(size), size)

    @staticmethod
    def spread(size: int, new_size: int) -> AxisMap:
        """Each unit followed by its copies, the copies spread evenly: 0, 0, 1, 1, 2, 2 ...

        This is ``repeat_interleave`` when ``size`` divides ``new_size``; heads need this order
        because neighbours share a noise head and a kv head.
        """
        return AxisMap(np.arange(new_size) * size // new_size, size)

    @staticmethod
    def tile(size: int, copies: int) -> AxisMap:
        """The whole axis again and again: 0, 1, 2, 0, 1, 2 ..."""
        return AxisMap(np.tile(np.arange(size), copies), size)

    @staticmethod
    def grouped(size: int, new_size: int, groups: int) -> AxisMap:
        """Copies spread evenly inside each of ``groups`` runs of consecutive units."""
        inner = AxisMap.spread(size // groups, new_size // groups).source
        starts = np.arange(groups)[:, None] * (size // groups)
        return AxisMap((starts + inner).reshape(-1), size)

    @staticmethod
    def with_new(size: int, new_size: int, groups: int) -> AxisMap:
        """New units at the end of each of ``groups`` runs of consecutive units."""
        inner = np.full(new_size // groups, NEW)
        inner[: size // groups] = np.arange(size // groups)
        starts = np.arange(groups)[:, None] * (size // groups)
        return AxisMap(np.where(inner == NEW, NEW, starts + inner).reshape(-1), size)


def copy_multiplicity(source: IntArray) -> IntArray:
    """Number of occurrences of each entry of ``source``; 0 where it is ``NEW``."""
    if not len(source):
        return source.copy()
    counts = np.bincount(source + 1, minlength=1)
    counts[0] = 0
    return counts[source + 1]


def copy_rank(source: IntArray) -> IntArray:
    """Position of each entry among the equal entries of ``source``, in order."""
    order = np.argsort(source, kind="stable")
    ordered = source[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(source) else ordered
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(source)))
    rank = np.empty_like(source)
    rank[order] = np.arange(len(source)) - np.repeat(starts, lengths)
    return rank
