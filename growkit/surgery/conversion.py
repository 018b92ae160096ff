"""What a conversion is given and what it returns: the model in another attention, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import Checkpoint
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.effect import Exactness, ModelShape

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Alias:
    """Units of a written axis are units of another axis of the source.

    Attributes:
        axis: the source's axis.
        parts: part of a unit in the written layout -> part of it in the source; None: the same. A
            part that is not named is new.
    """

    axis: str
    parts: Mapping[int, int] | None = None

    def part(self, written: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Source part of each written part, or ``NEW``."""
        if self.parts is None:
            return written
        return np.array([self.parts.get(int(p), NEW) for p in written], dtype=np.int64)


UnitMaps = tuple[Mapping[str, Alias], Mapping[str, AxisMap]]


@dataclass(frozen=True)
class Computed:
    """Entries of a written tensor that are calculated, not looked up.

    Attributes:
        rows: (checkpoint, source layer, first row, rows) -> block [rows, columns], wide enough
            (float32 or float64) to be rounded once to the stored dtype. Must not depend on how the
            rows are cut into blocks. A vector is a matrix of one column.
        reads: roles of the source that it is made of; the first one gives the dtype.
    """

    rows: Callable[[Checkpoint, int, int, int], Array]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """One checkpoint's model in another attention.

    Attributes:
        config: config.json of the written model, complete but for ``auto_map``.
        summary: one sentence for the plan.
        exactness: how far the written model computes the same.
        reason: one line of algebra and its source.
        aliases: written axes that are another axis of the source.
        axes: map of every written axis whose units are not the source's one by one.
        factors: role -> factor on its weight.
        starts: role -> how a tensor that the source has not starts (``zeros``, ``ones``,
            ``normal``), where the family's own start would change the function.
        computed: role -> how its entries are calculated.
        by_role: role -> (aliases, axes) that hold for it instead.
        verbatim: roles whose bytes are the source's, whatever the two formats call their units.
        shared_rows: roles of which the model adds up the copies of a row: each gets a share.
        warnings: what a user should know before training.
        measure: further lines to say, from the source's weights; calculated when it is converted.
    """

    config: dict[str, Any]
    summary: str
    exactness: Exactness
    reason: str
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)
    by_role: Mapping[str, UnitMaps] = field(default_factory=dict)
    verbatim: frozenset[str] = frozenset()
    shared_rows: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    measure: Callable[[Checkpoint], tuple[str, ...]] | None = None


class Conversion(Protocol):
    """A request that becomes a :class:`Converted`: a small pure object, no tensor in sight."""

    def apply(self, shape: ModelShape) -> Converted:
        """Raises UsageError when the model cannot be converted that way."""
        ...


def constant_rows(make: Callable[[], Array], like: str = "q") -> Computed:
    """The same small tensor in every layer, in the dtype of the role ``like``."""

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        return np.asarray(make()[first : first + count], np.float64)

    return Computed(rows, (like,))


def filled(shape: tuple[int, ...], value: float) -> Computed:
    """One number everywhere."""
    return constant_rows(lambda: np.full(shape, value))
