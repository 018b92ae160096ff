"""The index map of one dimension of one tensor, from its axis maps and the order of its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from growkit.core.errors import GrowkitError
from growkit.families.base import Dim
from growkit.families.unit_layout import IntArray, Units
from growkit.surgery.axis_map import NEW, AxisMap, copy_multiplicity, copy_rank
from growkit.surgery.effect import SILENT, Alias, Fill, NewUnits

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DimMap:
    """Where every unit of a written dimension comes from. Equal to itself alone.

    Attributes:
        source: unit of the old dimension, or ``NEW``; shape [units].
        block: elements a unit.
        consumes: copies share the weight (True) or are equal (False).
        old_width: elements of the old dimension.
        fill: what each ``NEW`` unit holds (:class:`Fill`); shape [units]. None: ``INIT`` where the
            dimension produces, ``ZERO`` where it consumes.
        scale: factor on each unit (keys, when head_dim grows); shape [units]. None: all one.
        perturbed: units whose copies are parted by noise; shape [units]. None: none.
    """

    source: IntArray
    block: int
    consumes: bool
    old_width: int
    fill: IntArray | None = None
    scale: npt.NDArray[np.float64] | None = None
    perturbed: Mask | None = None

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

    def new(self, fill: Fill) -> Mask:
        """Elements of the units without a source that hold ``fill``; shape [width]."""
        silent = SILENT.consumed if self.consumes else SILENT.produced
        held = np.full(len(self.source), silent) if self.fill is None else self.fill
        return np.repeat((self.source == NEW) & (held == fill), self.block)

    @cached_property
    def fills(self) -> tuple[Fill, ...]:
        """What new units hold, whatever occurs."""
        return tuple(fill for fill in Fill if self.new(fill).any())

    @cached_property
    def element_scale(self) -> npt.NDArray[np.float64] | None:
        """Factor on each element; shape [width]. None: all one."""
        return None if self.scale is None else np.repeat(self.scale, self.block)

    @property
    def computes(self) -> bool:
        """Its entries cannot be copied as bytes or drawn without looking at others."""
        changed = self.scale is not None or self.perturbed is not None
        return self.shares or changed or Fill.MEAN in self.fills

    @cached_property
    def new_ranges(self) -> list[tuple[int, int]]:
        """[start, end) of written elements that are new units or further copies."""
        return ranges_of(np.repeat((self.source == NEW) | (self.rank > 0), self.block))


def ranges_of(here: Mask) -> list[tuple[int, int]]:
    """[start, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], here, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def map_dim(
    old: Units,
    new: Units,
    axes: Mapping[str, AxisMap],
    dim: Dim,
    rules: Mapping[str, NewUnits] | None = None,
    key_factor: float = 1.0,
    aliases: Mapping[str, Alias] | None = None,
    perturbed: frozenset[str] = frozenset(),
) -> DimMap | None:
    """The map from a dimension laid out as ``old`` to one laid out as ``new``.

    Args:
        old, new: units before and after.
        axes: maps of the axes that grow; ``head_dim`` maps the channels inside a head, where these
            grow or (in a conversion) change places.
        dim: which dimension it is.
        rules: what new units of an axis hold, where that is not :data:`SILENT`.
        key_factor: on the entries of attention keys.
        aliases: written axes that are another axis of the source (in a conversion).
        perturbed: axes whose copies are parted by noise on what produces them.

    Returns:
        None when nothing moves.
    """
    rules, aliases = rules or {}, aliases or {}
    source = np.full(len(new), NEW, dtype=np.int64)
    fill = np.full(len(new), SILENT.of(dim), dtype=np.int64)
    is_key = np.zeros(len(new), np.bool_)
    noisy = np.zeros(len(new), np.bool_)
    positions = _positions(old)
    for code, axis in enumerate(new.axes):
        here = new.axis == code
        index = new.index[here]
        if axis in axes:
            index = axes[axis].source[index]
        alias = aliases.get(axis)
        table = positions[alias.axis if alias else axis]
        part = alias.part(new.part[here]) if alias else new.part[here]
        known = table[np.maximum(part, 0), np.maximum(index, 0)]
        found = np.where((index == NEW) | (part == NEW), NEW, known)
        source[here] = found
        fill[here] = rules.get(axis, SILENT).of(dim)
        noisy |= here & (axis in perturbed and not dim.consumes)
        for key_axis, part in dim.keys:
            is_key |= here & (new.part == part) & (axis == key_axis)
    block, channels = new.block, axes.get("head_dim")
    reordered = channels is not None and channels.old_size == channels.new_size == block
    if old.block != new.block or reordered:
        if channels is None or (channels.old_size, channels.new_size) != (old.block, new.block):
            raise GrowkitError(f"a unit of {old.block} elements cannot become one of {new.block}")
        rule = rules.get("head_dim", SILENT)
        inside = np.where(is_key, rule.keys, rule.of(dim))
        source, fill = _channels(source, fill, channels.source, old.block, inside)
        is_key, noisy, block = np.repeat(is_key, block), np.repeat(noisy, block), 1
    if len(source) * block == old.width and bool((source == np.arange(len(source))).all()):
        return None
    scale = np.where(is_key, key_factor, 1.0) if key_factor != 1.0 and is_key.any() else None
    moved = noisy if noisy.any() else None
    return DimMap(source, block, dim.consumes, old.width, fill, scale, moved)


def _channels(
    source: IntArray, fill: IntArray, inner: IntArray, old_block: int, inside: IntArray
) -> tuple[IntArray, IntArray]:
    """Sources and fills of single channels, where units grow ``inside``."""
    whole, part = source[:, None], inner[None, :]
    new_unit, new_channel = whole == NEW, part == NEW
    elements = np.where(new_unit | new_channel, NEW, whole * old_block + part)
    filled = np.where(~new_unit & new_channel, inside[:, None], fill[:, None])
    return elements.reshape(-1), filled.reshape(-1)


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
