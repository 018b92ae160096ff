"""Row and column maps applied to blocks of a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from growkit.families.unit_layout import IntArray
from growkit.surgery.axis_map import NEW
from growkit.surgery.dim_map import DimMap
from growkit.surgery.symmetry import Symmetry, compute_dtype, shares

if TYPE_CHECKING:
    from growkit.surgery.tensor_plans import TensorPlan
from math import prod

from growkit.surgery.plan import Plan
from growkit.surgery.tensor_plans import TensorPlan

Array = npt.NDArray[Any]
Indices = slice | IntArray


class RowTargets:
    """Written rows of each range of old rows: the inverse of a row map, as runs.

    With ``unit`` bytes a row, everything is counted in bytes instead.
    """

    def __init__(self, rows: DimMap | None, old_rows: int, unit: int = 1) -> None:
        if rows is None:
            self.runs = [(0, 0, 0, old_rows * unit)]
            return
        self.runs = []
        for rank in range(int(rows.multiplicity.max(initial=0))):
            here = np.flatnonzero((rows.rank == rank) & (rows.source != NEW))
            sources = rows.source[here]
            breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(here) != 1)) + 1
            for part in np.split(np.arange(len(here)), breaks):
                size = rows.block * unit
                old, new = int(sources[part[0]]) * size, int(here[part[0]]) * size
                self.runs.append((rank, old, new, len(part) * size))

    def within(self, first: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(rank, offset in the block, written row, rows) for the old rows [first, end)."""
        for rank, old, new, count in self.runs:
            low, high = max(old, first), min(old + count, end)
            if low < high:
                yield rank, low - first, new + low - old, high - low


class ColumnMoves:
    """A column map, worked out once and applied to many blocks; None moves nothing.

    New columns are zero at first. Units with several readers are shared by the symmetry; producers
    are copied as they are.
    """

    def __init__(self, columns: DimMap | None) -> None:
        self.columns = columns
        self.start: Any = np.empty
        # (copies, units that have so many, [(written units, which of those units)] for each copy)
        self.moves: list[tuple[int, Indices, list[tuple[Indices, Indices]]]] = []
        if columns is None:
            return
        known = columns.source != NEW
        self.start = np.empty if known.all() else np.zeros
        if not columns.consumes:
            # Copy by copy: the first ones of a tiling are neighbours, and so are the second ones.
            ranks = range(int(columns.multiplicity.max(initial=0)))
            places = [np.flatnonzero(known & (columns.rank == rank)) for rank in ranks]
            parts = [(_indices(p), _indices(columns.source[p])) for p in places]
            self.moves = [(1, slice(None), parts)]
            return
        for copies in np.unique(columns.multiplicity[columns.multiplicity > 0]):
            here = columns.multiplicity == copies
            sources = np.unique(columns.source[here])
            places = [np.flatnonzero(here & (columns.rank == rank)) for rank in range(copies)]
            parts = [
                (_indices(p), _indices(np.searchsorted(sources, columns.source[p]))) for p in places
            ]
            self.moves.append((int(copies), _indices(sources), parts))

    def apply(self, block: Array, symmetry: Symmetry, name: str, position: int) -> Array:
        """The written block [rows, columns] of a source block [rows, old columns].

        Args:
            block: contiguous rows of the source.
            symmetry: how copies share.
            name: of the written tensor, part of the random key.
            position: index of the block, part of the random key.
        """
        if self.columns is None:
            return block
        height, width = len(block), self.columns.block
        units = block.reshape(height, -1, width)
        grown: Array = self.start((height, len(self.columns.source), width), block.dtype)
        for copies, sources, moves in self.moves:
            picked = units[:, sources]
            key = f"{name}#{copies}"
            whole = all(_is_whole(order, picked.shape[1]) for _, order in moves)
            out = [grown[:, places] for places, _ in moves if isinstance(places, slice)]
            if copies > 1 and symmetry.mode == "split" and whole and len(out) == copies:
                shares(picked, copies, symmetry, key, position, out)
                continue
            parts: Sequence[Array] = [picked] * len(moves)
            if copies > 1:
                made = shares(picked.reshape(height, -1), copies, symmetry, key, position)
                parts = [part.reshape(picked.shape) for part in made]
            for part, (places, order) in zip(parts, moves, strict=True):
                grown[:, places] = part[:, order]
        return grown.reshape(height, -1)


def _is_whole(order: Indices, count: int) -> bool:
    """All units, in order."""
    return isinstance(order, slice) and order == slice(0, count, 1)


def _indices(positions: IntArray) -> Indices:
    """Evenly spaced positions as a slice: it needs no copy and writes several times faster."""
    if len(positions) == 0:
        return slice(0, 0)
    step = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    if step < 1 or (np.diff(positions) != step).any():
        return positions
    return slice(int(positions[0]), int(positions[-1]) + 1, step)


def rescale(
    block: Array,
    factor: float,
    gain_offset: float,
    stored: np.dtype[Any],
    rows: Array | None = None,
    columns: Array | None = None,
) -> Array:
    """``(block + gain_offset) * factor - gain_offset``, rounded once to ``stored``.

    Args:
        block: [rows, columns].
        factor: on every entry.
        gain_offset: what the model adds to every entry.
        stored: dtype of the written tensor; wider than the source's for small gains.
        rows, columns: further factors [rows] and [columns], or None.
    """
    if factor == 1.0 and rows is None and columns is None:
        return block
    wide = block.astype(np.float64 if gain_offset else compute_dtype(block.dtype))
    scale = np.asarray(factor, np.float64)
    if rows is not None:
        scale = scale * rows[:, None]
    if columns is not None:
        scale = scale * columns
    offset = wide.dtype.type(gain_offset)
    rescaled: Array = ((wide + offset) * scale.astype(wide.dtype) - offset).astype(stored)
    return rescaled


def row_scale(rows: DimMap | None, old_rows: int) -> Array | None:
    """Factor on each old row (copies of a row have the same); shape [old rows]. None: all one."""
    if rows is None or rows.scale is None:
        return None
    known = rows.source != NEW
    factors = np.ones(old_rows // rows.block)
    factors[rows.source[known]] = rows.scale[known]
    return np.repeat(factors, rows.block)


def expand_rows(
    block: Array, rows: DimMap, first: int, symmetry: Symmetry, name: str, position: int
) -> list[Array]:
    """One block for each copy, where the copies of a row differ: they share it (transposed
    layouts), or noise parts them (``rows.perturbed``)."""
    counts = np.zeros(rows.old_width // rows.block, np.int64)
    known = rows.source != NEW
    counts[rows.source[known]] = rows.multiplicity[known]
    differ = np.full(len(counts), rows.perturbed is None)
    if rows.perturbed is not None:
        differ[rows.source[rows.perturbed & known]] = True
    of_row = slice(first, first + len(block))
    per_row = np.repeat(counts, rows.block)[of_row]
    differs = np.repeat(differ, rows.block)[of_row]
    start = np.zeros_like if rows.perturbed is None else np.copy
    variants = [start(block) for _ in range(int(counts.max()))]
    for copies in np.unique(per_row[differs]):
        here = differs & (per_row == copies)
        parts = shares(block[here], int(copies), symmetry, f"{name}#{copies}", position)
        factor = 1.0 if rows.perturbed is None else float(copies)
        for variant, part in zip(variants, parts, strict=False):
            variant[here] = rescale(part, factor, 0.0, block.dtype)
    return variants


def part_of(block: Array, tensor: TensorPlan, symmetry: Symmetry, position: int) -> Array:
    """The part of a block of source rows that goes into ``tensor``, before its factor.

    All copies draw the same random numbers, keyed by the source: so the parts sum to the block.

    Args:
        block: rows of the source [rows, columns].
        tensor: one matrix.
        symmetry: how copies share.
        position: number of the block in the source.
    """
    share = tensor.share
    if share is None:
        return block
    key = f"{tensor.source_key}#experts{share.copies}"
    return shares(block, share.copies, symmetry, key, position)[share.rank]


# Sources of a block are read whole rows at a time; a few MB keep the memory bounded.
BLOCK_ELEMENTS = 1 << 20


def computed_blocks(plan: Plan, tensor: TensorPlan) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(byte offset in the tensor, block of rows in the stored dtype) of a computed tensor.

    A vector is a matrix of one column.
    """
    computed, dtype = tensor.computed, tensor.stored
    assert computed is not None
    rows, *rest = tensor.output.shape
    width = prod(rest)
    layer = tensor.layer_source.source if tensor.layer_source else 0
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        block = computed.rows(plan.checkpoint, layer, first, count)
        yield (
            first * width * dtype.itemsize,
            np.ascontiguousarray(block.reshape(count, width).astype(dtype)),
        )
