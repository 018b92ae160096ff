"""Query and key/value heads together: whole groups are copied beside themselves.

    q  [q0 q1 | q2 q3]  ->  [q0 q1 | q0 q1 | q2 q3 | q2 q3]        k, v  [k0 k1] -> [k0 k0 k1 k1]

Exact: each copied head meets a copy of its own keys and values, and the shares of a head's o_proj
columns sum to the old columns. The ratio of query to key/value heads stays;
the KV cache grows. With multi-head attention a group is one head, so any number may be added. New
groups with zero o_proj columns are bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from growkit.families.unit_layout import IntArray
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, require_axis
from growkit.surgery.operators import OperatorRow
from growkit.surgery.operators.query_heads import reason_of, refuse_uneven, what_is_new
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class Heads:
    """Grow query and key/value heads at their ratio to ``amount``, counted in query heads.

    Attributes:
        amount: factor, increment or new number of query heads, in whole groups.
        new_heads: ``copy`` existing groups, or ``zero``: random groups with zero output columns.
    """

    axis: ClassVar[str] = "query_head"
    amount: Amount
    new_heads: str = "copy"

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "query_head", "--heads")
        require_axis(shape, "kv_head", "--heads")
        heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
        width = heads // kv
        whole = refuse_uneven(shape, self.new_heads)
        target = self.amount.resolve(heads, "--heads", "query heads", heads if whole else width)
        groups = target // width
        make = AxisMap.grouped if self.new_heads == "copy" else AxisMap.with_new
        group_map = make(kv, groups, 1)
        return Effect(
            operator="heads",
            summary=f"query heads {heads} -> {target} and key/value heads {kv} -> {groups} "
            f"({what_is_new(self.new_heads)})",
            axes={
                "query_head": AxisMap(_members(group_map.source, width), heads),
                "kv_head": group_map,
            },
            exactness=Exactness.EXACT if self.new_heads == "copy" else Exactness.BIT_EXACT,
            reason=reason_of(self.new_heads),
        )


def _members(groups: IntArray, width: int) -> IntArray:
    """The query heads of each group, in order."""
    first = groups[:, None]
    return np.where(first == NEW, NEW, first * width + np.arange(width)).reshape(-1)


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> Heads:
    return Heads(amount, request.new_heads)
