"""Hidden width: whole copies (HyperCloning, arXiv 2409.12903), or padding to any size.

The residual stream becomes [x, x, ...]: everything that writes it is copied (embedding columns,
o_proj and down_proj rows, norm gains), everything that reads it shares the weight (columns of q, k,
v, gate, up and of an untied lm_head). Mean and mean square of the stream stay, so RMSNorm and
LayerNorm do. A tied output projection reads the copied embedding unshared, so the final norm's gain
(and bias) carries 1 / n instead.

Where the class multiplies the embedding by sqrt(hidden_size) (Gemma), the stored embedding is
divided by sqrt(n), and a tied final gain by sqrt(n) instead of n (growth.md section 4a). Where it
divides the last hidden state by sqrt(hidden_size) (T5), the final gain carries sqrt(n) as well.

Sizes that are no whole multiple are padded (:mod:`growkit.surgery.operators.hidden_padding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from typing import ClassVar

from growkit.surgery.amount import Amount
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.growth import Exactness, Growth, ModelShape
from growkit.surgery.operators.hidden_padding import bfloat16_warning, pad_hidden

METHODS = ("auto", "tile", "pad")


@dataclass(frozen=True)
class Hidden:
    """Grow ``hidden_size``.

    Attributes:
        amount: factor, increment or new size.
        method: ``tile`` (whole multiples), ``pad`` (any size), or ``auto``: tile where it can.
    """

    axis: ClassVar[str] = "hidden"
    amount: Amount
    method: str = "auto"

    def apply(self, shape: ModelShape) -> Growth:
        width = shape.sizes["hidden"]
        multiple = width if self.method == "tile" else 1
        target = self.amount.resolve(width, "--hidden", "hidden channels", multiple)
        if self.method == "pad" or target % width:
            return pad_hidden(shape, target)
        return self._tile(shape, target)

    @staticmethod
    def _tile(shape: ModelShape, target: int) -> Growth:
        width = shape.sizes["hidden"]
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
            reason="whole copies keep mean and mean square; readers share the weight "
            "(HyperCloning, arXiv 2409.12903)",
            warnings=bfloat16_warning(width, target) if scaled else (),
        )
