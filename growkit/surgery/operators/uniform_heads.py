"""Uniform heads: the baseline that copies signal and noise heads alike.

Whole groups are repeated beside themselves, inside their kv pair::

    [s0 s1 s2 | n0] [s3 s4 s5 | n1]   ->   [s0 s1 s2 | n0] [s0 s1 s2 | n0] [s3 s4 s5 | n1] ...

Exact: each copied head meets a copy of its noise head and its old keys; shares of o_proj columns
sum to the old columns. (Tiling all groups would move copies to other kv pairs and break it.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, require_axis
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest


@dataclass(frozen=True)
class UniformHeads:
    """Grow all heads at the same ratio to ``amount`` (counted in signal + noise heads)."""

    axis: ClassVar[str] = "signal_head"
    amount: Amount

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "signal_head", "--uniform-heads")
        signal, noise, kv = (shape.sizes[a] for a in ("signal_head", "noise_head", "kv_head"))
        heads, groups = signal + noise, min(signal, noise)
        per_group = heads // groups
        target = self.amount.resolve(heads, "--uniform-heads", "heads", per_group * kv)
        group_source = AxisMap.grouped(groups, target // per_group, kv).source

        def members(size: int) -> AxisMap:
            width = size // groups
            return AxisMap(
                (group_source[:, None] * width + np.arange(width)).reshape(-1).astype(np.int64),
                size,
            )

        return Effect(
            operator="uniform_heads",
            summary=f"heads {heads} -> {target} at ratio {signal}:{noise}",
            axes={"signal_head": members(signal), "noise_head": members(noise)},
            exactness=Exactness.EXACT,
            reason="whole groups are copied inside their kv pair; the shares of a head's o_proj "
            "columns sum to the old columns",
        )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> UniformHeads:
    return UniformHeads(amount)
