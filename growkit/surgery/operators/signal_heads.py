"""Signal heads: group-differentiated growth.

Every signal head of a group is copied beside itself; the group's noise head, the keys, the values,
lambda and the sub-layer norm stay::

    q_proj rows     [s0 s1 s2 | n0] ...   ->   [s0 s0 s1 s1 s2 s2 | n0] ...      (x2)
    o_proj columns  [s0 s1 s2 ...]        ->   [a0 b0 a1 b1 a2 b2 ...],  a + b = s

Exact for any norm inside the head, since lambda is one scalar a layer, the norm sees each head
alone, and the noise output is broadcast to its group (arXiv 2510.06949; algebra: shares of one
head's o_proj columns sum to the old columns). New heads with zero o_proj columns are bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, require_axis
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class SignalHeads:
    """Grow the signal heads to ``amount``.

    Attributes:
        amount: factor, increment or new total of signal heads; a multiple of the noise heads.
        new_heads: ``copy`` existing heads, or ``zero``: random heads with zero output columns.
    """

    axis: ClassVar[str] = "signal_head"
    amount: Amount
    new_heads: str = "copy"

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "signal_head", "--signal-heads")
        signal, noise = shape.sizes["signal_head"], shape.sizes["noise_head"]
        if signal < noise:
            raise UsageError(
                f"--signal-heads cannot grow {signal} signal heads below {noise} noise heads: the "
                "copies would need noise heads of their own.",
                "Use --uniform-heads, which copies both groups.",
            )
        target = self.amount.resolve(signal, "--signal-heads", "signal heads", noise)
        make = AxisMap.grouped if self.new_heads == "copy" else AxisMap.with_new
        what = "copies" if self.new_heads == "copy" else "new heads with zero output"
        return Effect(
            operator="signal_heads",
            summary=f"signal heads {signal} -> {target} ({what}), noise heads {noise} unchanged",
            axes={"signal_head": make(signal, target, noise)},
            exactness=Exactness.EXACT if self.new_heads == "copy" else Exactness.BIT_EXACT,
            reason="the shares of a head's o_proj columns sum to the old columns; lambda is one "
            "scalar a layer and the norm sees each head alone (arXiv 2510.06949)",
        )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> SignalHeads:
    return SignalHeads(amount, request.new_heads)
