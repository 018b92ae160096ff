"""What the entries of units without a source hold: a rule an axis, read by writer and diff."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from growkit.families.base import Dim


class Fill(IntEnum):
    """What an entry of a new unit starts as. Where two new units meet, the smallest wins."""

    ZERO = 0
    MEAN = 1  # of the old entries, along the dimension that grows
    INIT = 2  # as a model from scratch: random in a projection, one in a gain


@dataclass(frozen=True)
class NewUnits:
    """The rule of one axis.

    Attributes:
        produced: entries of what writes a new unit (rows of a projection, its bias).
        consumed: entries of what reads it.
        normed: gain and bias of a norm over the axis.
        keys: channels of attention keys (for head_dim), where they differ from ``produced``.
    """

    produced: Fill = Fill.INIT
    consumed: Fill = Fill.ZERO
    normed: Fill = Fill.INIT
    keys: Fill = Fill.INIT

    def of(self, dim: Dim) -> Fill:
        """The rule for one dimension of a tensor."""
        if dim.normed:
            return self.normed
        return self.consumed if dim.consumes else self.produced


# New heads and FFN units: anything may be computed where nobody listens yet.
SILENT = NewUnits()
