"""Figures of how two tensors differ, collected block by block: bounded memory, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from growkit.checkpoint import DTYPES, Checkpoint

Array = npt.NDArray[Any]
BLOCK_BYTES = 1 << 20


@dataclass
class Difference:
    """How far entries are from what they should be.

    Attributes:
        entries: entries compared.
        differing: entries whose value (or, in equal dtypes, bits) differ.
        max_difference: largest |difference|; NaN or infinity where one side has such a value.
        beyond_rounding: entries that differ by more than rounding when they were written.
        shares: number of copies -> [sum of |old weight|, sum of each copy's part of it].
    """

    entries: int = 0
    differing: int = 0
    max_difference: float = 0.0
    beyond_rounding: int = 0
    shares: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)

    def look(
        self,
        found: Array,
        expected: Array,
        *,
        by_value: bool = False,
        rounding: Array | None = None,
    ) -> None:
        """Compare two blocks of one shape: equal dtypes by their bits, unless ``by_value``.

        ``rounding`` is how far each entry may be off because it was rounded on writing.
        """
        self.entries += found.size
        if found.dtype == expected.dtype and not by_value:
            same = _bits(found) == _bits(expected)
        else:
            same = found.astype(np.float64) == expected.astype(np.float64)
        if same.all():
            return
        other = ~same
        self.differing += int(other.sum())
        with np.errstate(invalid="ignore"):
            distance = np.abs(found[other].astype(np.float64) - expected[other].astype(np.float64))
        allowed = 0.0 if rounding is None else rounding[other]
        self.beyond_rounding += int((~(distance <= allowed)).sum())
        # max() would drop a NaN that does not come first.
        self.max_difference = float(np.max([self.max_difference, np.max(distance)]))

    def look_share(self, copies: int, parts: list[Array], whole: Array) -> None:
        """Add the parts of ``whole`` that each of ``copies`` readers carries; all [rows, ...]."""
        sign = np.sign(whole)
        sums = np.array([np.abs(whole).sum(), *((part * sign).sum() for part in parts)])
        self.shares[copies] = self.shares.get(copies, 0) + sums

    def add(self, other: Difference) -> None:
        """Collect the figures of another tensor too."""
        self.entries += other.entries
        self.differing += other.differing
        self.beyond_rounding += other.beyond_rounding
        self.max_difference = float(np.max([self.max_difference, other.max_difference]))
        for copies, sums in other.shares.items():
            self.shares[copies] = self.shares.get(copies, 0) + sums

    @property
    def mean_shares(self) -> dict[int, list[float]]:
        """Number of copies -> mean part of the old weight that each carries."""
        return {
            copies: [float(part / sums[0]) if sums[0] else float("nan") for part in sums[1:]]
            for copies, sums in sorted(self.shares.items())
        }


def _bits(block: Array) -> Array:
    return np.ascontiguousarray(block).view(np.dtype(f"u{block.dtype.itemsize}"))


def compare_tensors(a: Checkpoint, name_a: str, b: Checkpoint, name_b: str) -> Difference:
    """Compare two tensors of one shape entry by entry, in any float dtypes."""
    result = Difference()
    info_a, info_b = a.tensors[name_a], b.tensors[name_b]
    kinds = DTYPES[info_a.dtype].numpy, DTYPES[info_b.dtype].numpy
    if None in kinds and info_a.dtype != info_b.dtype:  # nothing in them is comparable
        result.entries = result.differing = result.beyond_rounding = prod(info_a.shape)
        result.max_difference = float("nan")
        return result
    if None in kinds:  # packed dtypes: bytes are all that can be compared
        kinds = (np.dtype(np.uint8), np.dtype(np.uint8))
    kind_a, kind_b = (np.dtype(kind) for kind in kinds)
    count = info_a.nbytes // kind_a.itemsize
    step = max(1, BLOCK_BYTES // 8)
    for first in range(0, count, step):
        height = min(step, count - first)
        blocks = []
        for checkpoint, name, kind in ((a, name_a, kind_a), (b, name_b, kind_b)):
            block: Array = np.empty(height, kind)
            checkpoint.read_into(name, block, first * kind.itemsize)
            blocks.append(block)
        result.look(blocks[1], blocks[0])
    return result
