"""Hidden width by whole copies: HyperCloning (arXiv 2409.12903).

The residual stream becomes [x, x, ...]: everything that writes it is copied (embedding columns,
o_proj and down_proj rows, norm gains), everything that reads it shares the weight (columns of q, k,
v, gate, up and of an untied lm_head). RMSNorm keeps its mean square. A tied output projection
reads the copied embedding unshared, so the final norm's gain carries 1 / n instead.

Where the class multiplies the embedding by sqrt(hidden_size) (Gemma), the stored embedding is
divided by sqrt(n), and a tied final gain by sqrt(n) instead of n (growth.md section 4a). Where it
divides the last hidden state by sqrt(hidden_size) (T5), the final gain carries sqrt(n) as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import ml_dtypes
import numpy as np

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
        scaled = shape.family.sqrt_embedding_scale
        embedding_factor = copies**-0.5 if scaled else 1.0
        final_factor = (embedding_factor if scaled else 1.0 / copies) if tied else 1.0
        if shape.family.sqrt_head_divisor(shape.sizes):
            final_factor *= copies**0.5
        rounds = any(frexp(factor)[0] != 0.5 for factor in (embedding_factor, final_factor))
        notes = []
        if scaled:
            notes.append(f"embedding divided by sqrt({copies})")
        if final_factor != 1.0:
            change = f"divided by {1 / final_factor:.5g}"
            if final_factor > 1:
                change = f"multiplied by {final_factor:.5g}"
            notes.append(f"final norm gain {change}" + (" (tied embeddings)" if tied else ""))
        return Growth(
            operator="hidden",
            summary=", ".join([f"hidden size {width} -> {target}", *notes]),
            axes={"hidden": AxisMap.tile(width, copies)},
            final_norm_factor=final_factor,
            embedding_factor=embedding_factor,
            exactness=Exactness.ROUNDED if rounds else Exactness.EXACT,
            reason="whole copies keep RMSNorm's mean square; readers share the weight "
            "(HyperCloning, arXiv 2409.12903)",
            warnings=_bfloat16_warning(width, target) if scaled else (),
        )


def _bfloat16_warning(width: int, target: int) -> tuple[str, ...]:
    """A class that scales embeddings by sqrt(hidden_size) rounds that number to the dtype."""
    before = float(np.float32(width**0.5).astype(ml_dtypes.bfloat16))
    after = float(np.float32(target**0.5).astype(ml_dtypes.bfloat16))
    change = after / before / (target / width) ** 0.5 - 1.0
    if abs(change) < 1e-9:
        return ()
    return (
        f"in bfloat16 compute the class rounds its embedding scale sqrt({width}) to {before:g} and "
        f"sqrt({target}) to {after:g}, which scales embeddings by {1 + change:.5f}; a factor of 4 "
        "would not, and float32 compute does not",
    )
