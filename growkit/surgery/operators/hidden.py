"""Hidden width by whole copies: HyperCloning (arXiv 2409.12903).

The residual stream becomes [x, x, ...]: everything that writes it is copied (embedding columns,
o_proj and down_proj rows, norm gains), everything that reads it shares the weight (columns of q, k,
v, gate, up and of an untied lm_head). RMSNorm keeps its mean square. A tied output projection
reads the copied embedding unshared, so the final norm's gain carries 1 / n instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.growth import Exactness, Growth, ModelShape


@dataclass(frozen=True)
class Hidden:
    """Grow ``hidden_size`` to a whole multiple."""

    amount: Amount

    def apply(self, shape: ModelShape) -> Growth:
        width = shape.sizes["hidden"]
        target = self.amount.resolve(width, "--hidden", "hidden channels", width)
        copies = target // width
        tied = bool(shape.sizes["tied"])
        power_of_two = copies & (copies - 1) == 0
        return Growth(
            operator="hidden",
            summary=f"hidden size {width} -> {target}"
            + (f", final norm gain divided by {copies} (tied embeddings)" if tied else ""),
            axes={"hidden": AxisMap.tile(width, copies)},
            final_norm_factor=1.0 / copies if tied else 1.0,
            exactness=Exactness.EXACT if power_of_two or not tied else Exactness.ROUNDED,
            reason="whole copies keep RMSNorm's mean square; readers share the weight "
            "(HyperCloning, arXiv 2409.12903)",
        )
