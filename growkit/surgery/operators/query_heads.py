"""Query heads of ordinary attention; the key/value heads stay, and with them the KV cache.

Copies stand beside their head, inside the group of heads that reads one key/value head::

    q_proj rows     [q0 q1 | q2 q3]   ->   [q0 q0 q1 q1 | q2 q2 q3 q3]      (x2, two kv heads)
    o_proj columns  [q0 q1 | q2 q3]   ->   [a0 b0 a1 b1 | ...],  a + b = q

Exact for any norm inside a head: each copy computes what its head computes, and the shares of a
head's o_proj columns sum to the old columns (tiling would move copies to other kv heads).
New heads with zero o_proj columns are bit-exact. Where a norm runs over all query heads (OLMo 2)
only the same number of copies of every head keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, require_axis, shares_heads
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class QueryHeads:
    """Grow the query heads to ``amount``, a multiple of the key/value heads.

    Attributes:
        amount: factor, increment or new number of query heads.
        new_heads: ``copy`` existing heads, or ``zero``: random heads with zero output columns.
    """

    axis: ClassVar[str] = "query_head"
    amount: Amount
    new_heads: str = "copy"

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "query_head", "--query-heads")
        require_axis(shape, "kv_head", "--query-heads")
        heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
        whole = refuse_uneven(shape, self.new_heads)
        target = self.amount.resolve(heads, "--query-heads", "query heads", heads if whole else kv)
        make = AxisMap.grouped if self.new_heads == "copy" else AxisMap.with_new
        return Effect(
            operator="query_heads",
            summary=f"query heads {heads} -> {target} ({what_is_new(self.new_heads)}), "
            f"key/value heads {kv} unchanged",
            axes={"query_head": make(heads, target, kv)},
            exactness=Exactness.EXACT if self.new_heads == "copy" else Exactness.BIT_EXACT,
            reason=reason_of(self.new_heads),
        )


def refuse_uneven(shape: ModelShape, new_heads: str) -> bool:
    """Whether only whole copies of all query heads are exact; then new heads are refused."""
    whole = "query_head" in shape.family.full_copies_only(shape.sizes)
    if whole and new_heads == "zero":
        raise UsageError(
            f"New heads with zero output would change the norm that {shape.family.name} runs over "
            "all query heads.",
            "Copy heads (leave --new-heads at copy) by a whole factor such as x2.",
        )
    return whole


def what_is_new(new_heads: str) -> str:
    """The new heads in a plan's summary."""
    return "copies" if new_heads == "copy" else "new heads with zero output"


def reason_of(new_heads: str) -> str:
    """Why head growth keeps the function."""
    if new_heads == "zero":
        return "o_proj's columns of the new heads are zero"
    return (
        "a copied head meets its old keys and values; the shares of its o_proj columns sum to the "
        "old columns (Net2Net, arXiv 1511.05641, applied to heads)"
    )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> QueryHeads:
    return QueryHeads(amount, request.new_heads)


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    return row.axis in shape.sizes and shares_heads(shape)
