"""Key/value heads: fewer query heads share one; nothing but k_proj and v_proj changes.

Every key/value head is repeated beside itself, and the query heads that shared it are divided among
the copies::

    k, v   [k0 k1]             ->   [k0 k0 k1 k1]                               (x2)
    q      [q0 q1 | q2 q3]     ->   [q0 | q1 | q2 | q3]                         (unchanged)

Bit-exact: every query head meets the same keys and values (tiling the key/value heads would be
wrong). The KV cache grows by the same factor. The copies serve different query heads, so they
receive different gradients and separate by themselves, whatever --symmetry says. In differential
attention a unit is a pair: k1, k2 and v1, v2 stay together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, require_axis, shares_heads
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class KvHeads:
    """Grow the key/value heads (pairs, in differential attention) to ``amount``.

    Attributes:
        amount: factor, increment or new number; a multiple of the old number that divides the
            query heads (the signal and the noise heads).
    """

    axis: ClassVar[str] = "kv_head"
    amount: Amount

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "kv_head", "--kv-heads")
        kv = shape.sizes["kv_head"]
        readers = {
            name: shape.sizes[name]
            for name in ("query_head", "signal_head", "noise_head")
            if name in shape.sizes
        }
        unit = "key/value pairs" if shape.sizes.get("parts") == 2 else "key/value heads"
        asked = self.amount.exact(kv)
        common = gcd(*readers.values())
        if asked >= kv and (asked % kv or common % asked):
            possible = [n for n in range(kv + 1, common + 1) if not n % kv and not common % n]
            heads = " and ".join(f"{n} {name.replace('_', ' ')}s" for name, n in readers.items())
            raise UsageError(
                f"--kv-heads {self.amount.text} asks for {float(asked):g} {unit} from {kv}, which "
                f"has to be a multiple of {kv} and divide {heads}.",
                f"Possible: {', '.join(map(str, possible))}."
                if possible
                else "Grow the heads that read them first (they may be grown in the same command).",
            )
        target = self.amount.resolve(kv, "--kv-heads", unit, kv)
        # Where a norm runs over all key heads, its mean square is summed in another order.
        normed = "kv_head" in shape.family.full_copies_only(shape.sizes)
        return Effect(
            operator="kv_heads",
            summary=f"{unit} {kv} -> {target}, the heads that read them unchanged",
            axes={"kv_head": AxisMap.spread(kv, target)},
            exactness=Exactness.EXACT if normed else Exactness.BIT_EXACT,
            reason="every query head meets a copy of its old keys and values",
        )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> KvHeads:
    return KvHeads(amount)


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    return row.axis in shape.sizes and shares_heads(shape)
