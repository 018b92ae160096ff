"""Head size: new channels at the end of every head, where the position encoding leaves them alone.

With d channels a score is q.k / sqrt(d). New query channels are random and new key channels zero,
so products stay; old keys carry sqrt(d^/d) to make up for the larger root. New value channels are
random and read with zero columns of o_proj::

    q [q, *]    k [sqrt(d^/d) k, 0]    v [v, *]    o [o, 0]

Exact in real arithmetic (arXiv 2308.06103, section 3); the keys round unless d^ = 4 d. A class
without softmax scale (T5), or with a stored one, needs no factor.

Rotary position encoding turns the pairs (i, i + d/2) of a head by frequencies base^(-2i/d); both
depend on d, so there a larger d is another function of the same weights, with an error of the size
of the logits. Exact is partial rotary encoding: the number of rotated channels stays, and
``partial_rotary_factor`` is written so that int(d^ x factor) gives it; new channels are not turned.
Norms inside a head (of queries and keys, of a differential head's output) run over all of its
channels, and are refused too. The published methods (HyperCloning, LEMON, MSG) multiply heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, sqrt
from typing import Any, ClassVar

from growkit.core.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, Fill, ModelShape, NewUnits
from growkit.surgery.operators import OperatorRow
from growkit.surgery.request import GrowthRequest

NEW_CHANNELS = NewUnits(produced=Fill.INIT, consumed=Fill.ZERO, keys=Fill.ZERO)


@dataclass(frozen=True)
class HeadDim:
    """Grow ``head_dim`` to ``amount``."""

    axis: ClassVar[str] = "head_dim"
    amount: Amount

    def apply(self, shape: ModelShape) -> Effect:
        size, rule = shape.sizes["head_dim"], shape.family.head_dim
        if rule.refusal:
            instead = "--signal-heads" if shape.family.differential else "--query-heads or --heads"
            raise UsageError(
                f"--head-dim {self.amount.text}: {size} cannot grow, because {rule.refusal}.",
                f"Grow the number of heads by {instead}.",
            )
        target = self.amount.resolve(size, "--head-dim", "channels a head")
        notes: list[str] = []
        config: dict[str, Any] = {}
        if rule.rotary:
            rotated = rule.rotary.rotated(shape.config, size)
            if not shape.family.origin:  # a derived table states all of its fields together
                config = rule.rotary.rewritten(shape.config, target, rotated)
            notes.append(f"{rotated} of them rotated as before")
        factor = sqrt(target / size) if rule.scaled(shape.config) else 1.0
        if factor != 1.0:
            notes.append(f"keys x {factor:.5g}")
        rounds = frexp(factor)[0] != 0.5
        return Effect(
            operator="head_dim",
            summary=", ".join([f"head_dim {size} -> {target}", *notes]),
            axes={"head_dim": AxisMap.with_new(size, target, 1)},
            new_units={"head_dim": NEW_CHANNELS},
            sizes=dict.fromkeys(rule.along, target),
            key_factor=factor,
            fields=config,
            exactness=Exactness.ROUNDED if rounds else Exactness.EXACT,
            reason="new key channels and o_proj columns are zero; keys make up for the softmax "
            "scale (arXiv 2308.06103)",
        )


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> HeadDim:
    return HeadDim(amount)


def grows(row: OperatorRow, shape: ModelShape) -> bool:
    return not shape.family.head_dim.refusal
