"""Head size: refused, with the reason.

Rotary position encoding turns the pairs (i, i + d/2) of a head by frequencies base^(-2i/d); both
depend on the head size d, so a larger d is another function of the same weights, with an error of
the size of the logits. Exact growth needs channels that are not rotated: partial rotary encoding
with ``partial_rotary_factor`` rescaled, or none (2308.06103). No operator does that yet, and the
published methods (HyperCloning, LEMON, MSG) multiply heads instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from growkit.errors import UsageError
from growkit.surgery.amount import Amount
from growkit.surgery.growth import Growth, ModelShape


@dataclass(frozen=True)
class HeadDim:
    """Refuse to grow ``head_dim`` to ``amount``."""

    amount: Amount

    def apply(self, shape: ModelShape) -> Growth:
        size = shape.sizes["head_dim"]
        instead = "--signal-heads" if shape.family.differential else "--query-heads or --heads"
        raise UsageError(
            f"--head-dim {self.amount.text}: {size} cannot grow, because rotary position encoding "
            "derives its frequencies and its pairs of channels from head_dim, so no choice of "
            "weights keeps the function (channels without rotation are not supported yet).",
            f"Grow the number of heads by {instead}.",
        )
