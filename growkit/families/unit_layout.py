"""How one dimension of a tensor is made of the units of named axes.

A dimension is an ordered list of *units* (heads, FFN neurons, residual channels ...), each
``block`` elements wide. Two layouts of the same units (stripes, halves, adjacent pairs) differ in
nothing but the order of that list, so growing and re-ordering are the same lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Units:
    """The units of one dimension, in storage order.

    Attributes:
        axes: names of the axes that occur.
        axis: for each unit the position of its axis in ``axes``; shape [units].
        index: for each unit its index on that axis; shape [units].
        part: tells apart several units of one index (k1 and k2 of a pair); shape [units].
        block: elements a unit.
    """

    axes: tuple[str, ...]
    axis: IntArray
    index: IntArray
    part: IntArray
    block: int = 1

    def __len__(self) -> int:
        return len(self.index)

    @property
    def width(self) -> int:
        """Elements of the whole dimension."""
        return len(self.index) * self.block


Layout = Callable[[Sizes], Units]
Block = Callable[[Sizes], int]


def head_dim(sizes: Sizes) -> int:
    """Block of a query or key head."""
    return sizes["head_dim"]


def value_dim(sizes: Sizes) -> int:
    """Block of a head's output in front of o_proj."""
    return sizes["value_dim"]


def one(sizes: Sizes) -> int:
    """Block of an axis whose units are single channels."""
    return 1


def _units(axes: tuple[str, ...], rows: npt.NDArray[np.int64], block: int) -> Units:
    rows = rows.reshape(-1, 3)
    return Units(axes, rows[:, 0].copy(), rows[:, 1].copy(), rows[:, 2].copy(), block)


def _table(axis: int, index: IntArray, part: int = 0) -> IntArray:
    return np.stack([np.full_like(index, axis), index, np.full_like(index, part)], axis=-1)


def plain(axis: str, block: Block = one) -> Layout:
    """Units 0, 1, 2 ... of one axis."""

    def layout(sizes: Sizes) -> Units:
        index = np.arange(sizes[axis])
        # Most dimensions are these, and plans ask for them many times: no table of rows.
        none = np.zeros_like(index)
        return Units((axis,), none, index, none, block(sizes))

    return layout


def fixed(size: Callable[[Sizes], int]) -> Layout:
    """A dimension that no operator grows (vocabulary, head_dim, a norm inside a head)."""

    def layout(sizes: Sizes) -> Units:
        none = np.zeros(1, dtype=np.int64)
        return Units(("fixed",), none, none, none, size(sizes))

    return layout


def constant(width: int) -> Layout:
    """A dimension that never grows, of this width."""
    return fixed(lambda sizes: width)


def adjacent_parts(axis: str, parts: Callable[[Sizes], int], block: Block) -> Layout:
    """(axis, part): k1, k2 of pair 0, then k1, k2 of pair 1 (unilm, Motif, ours)."""

    def layout(sizes: Sizes) -> Units:
        index = np.arange(sizes[axis])
        rows = np.stack([_table(0, index, part) for part in range(parts(sizes))], axis=1)
        return _units((axis,), rows, block(sizes))

    return layout


def split_parts(axis: str, parts: int, block: Block) -> Layout:
    """(part, axis): the first part of every unit, then the second of every unit (DiffLlama)."""

    def layout(sizes: Sizes) -> Units:
        index = np.arange(sizes[axis])
        rows = np.concatenate([_table(0, index, part) for part in range(parts)])
        return _units((axis,), rows, block(sizes))

    return layout


def sections(parts: tuple[tuple[str, int], ...], block: Block) -> Layout:
    """All units of the first (axis, part), then all of the next: fused q, k, v projections."""
    axes = tuple(dict.fromkeys(axis for axis, _ in parts))

    def layout(sizes: Sizes) -> Units:
        rows = [_table(axes.index(a), np.arange(sizes[a]), part) for a, part in parts]
        return _units(axes, np.concatenate(rows), block(sizes))

    return layout


def interleaved(parts: tuple[tuple[str, int], ...], block: Block) -> Layout:
    """Every (axis, part) of index 0, then every one of index 1 (GPT-NeoX: q, k, v of a head)."""
    axes = tuple(dict.fromkeys(axis for axis, _ in parts))

    def layout(sizes: Sizes) -> Units:
        rows = [_table(axes.index(a), np.arange(sizes[a]), part) for a, part in parts]
        return _units(axes, np.stack(rows, axis=1), block(sizes))

    return layout


def stripes(first: str, second: str, block: Block = head_dim) -> Layout:
    """Groups of (units of ``first``, then units of ``second``): the Motif-2 order of GDA heads.

    There are ``min(first, second)`` groups; each holds consecutive units of both axes.
    """

    def layout(sizes: Sizes) -> Units:
        groups = min(sizes[first], sizes[second])
        a = _table(0, np.arange(sizes[first])).reshape(groups, -1, 3)
        b = _table(1, np.arange(sizes[second])).reshape(groups, -1, 3)
        return _units((first, second), np.concatenate([a, b], axis=1), block(sizes))

    return layout


def halves(first: str, second: str, block: Block = head_dim) -> Layout:
    """All units of ``first``, then all units of ``second`` (DiffLlama's query heads)."""

    def layout(sizes: Sizes) -> Units:
        rows = [_table(0, np.arange(sizes[first])), _table(1, np.arange(sizes[second]))]
        return _units((first, second), np.concatenate(rows), block(sizes))

    return layout
