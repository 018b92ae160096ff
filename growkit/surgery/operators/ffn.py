"""FFN width: copies of units, or new units with zero output.

Rows of gate and up are copied, columns of down share the weight (Net2Net, arXiv 1511.05641): exact
for any activation that works unit by unit. PolyNorm normalises over the FFN width, so there only
whole copies with tiling are exact (mean squares of a whole duplication are unchanged).
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
class Ffn:
    """Grow the FFN (``intermediate_size``) to ``amount``.

    Attributes:
        amount: factor, increment or new width.
        new_units: ``copy`` existing units, or ``zero``: random units with zero output columns.
    """

    axis: ClassVar[str] = "ffn"
    amount: Amount
    new_units: str = "copy"

    def apply(self, shape: ModelShape) -> Effect:
        require_axis(shape, "ffn", "--ffn")
        width = shape.sizes["ffn"]
        whole = "ffn" in shape.family.full_copies_only(shape.sizes)
        target = self.amount.resolve(width, "--ffn", "FFN units", width if whole else 1)
        if whole and self.new_units == "zero":
            raise UsageError(
                "New FFN units with zero output would change PolyNorm, which normalises over the "
                "FFN width.",
                "Copy units (leave --new-units at copy) by a whole factor such as x2.",
            )
        axes, summary = {"ffn": self._map(width, target)}, f"FFN width {width} -> {target}"
        if dense := shape.sizes.get("dense_ffn"):
            if self.amount.factor is None:
                raise UsageError(
                    f"--ffn {self.amount.text} is one number for two widths: {width} of the "
                    f"experts and {dense} of the layers without experts.",
                    "Give a factor, such as x2.",
                )
            other = self.amount.resolve(dense, "--ffn", "FFN units of layers without experts")
            axes["dense_ffn"] = self._map(dense, other)
            summary += f" of the experts, {dense} -> {other} of layers without"
        for axis, size in shape.sizes.items():  # of a derived table
            if axis.startswith("ffn_"):
                if self.amount.factor is None:
                    raise UsageError(
                        f"--ffn {self.amount.text} is one number for several widths: {width}, "
                        f"{size} ...",
                        "Give a factor, such as x2.",
                    )
                other = self.amount.resolve(size, "--ffn", "FFN units", size if whole else 1)
                axes[axis] = self._map(size, other)
                summary += f", {size} -> {other}"
        return Effect(
            operator="ffn",
            summary=summary,
            axes=axes,
            exactness=Exactness.BIT_EXACT if self.new_units == "zero" else Exactness.EXACT,
            reason="the shares of a unit's down_proj column sum to the old column "
            "(Net2Net, arXiv 1511.05641)",
        )

    def _map(self, width: int, target: int) -> AxisMap:
        if self.new_units == "zero":
            return AxisMap.with_new(width, target, 1)
        if target % width == 0:
            return AxisMap.tile(width, target // width)
        return AxisMap.spread(width, target)


def make(row: OperatorRow, amount: Amount, request: GrowthRequest) -> Ffn:
    return Ffn(amount, request.new_units)
