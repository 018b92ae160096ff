"""What engines make of a written config, as warnings of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from growkit.core.engines import derived_head_dim
from growkit.families.layout import Sizes
from growkit.surgery.effect import Effect


def head_dim_note(config: Mapping[str, Any], before: Sizes, growth: Effect) -> tuple[str, ...]:
    """Engines that would read other heads out of the written config, and the way round them."""
    sizes = growth.sizes
    if not {"query_head", "head_dim", "hidden"} <= sizes.keys():
        return ()
    hidden, heads, head_dim = sizes["hidden"], sizes["query_head"], sizes["head_dim"]
    engines = derived_head_dim(config.get("model_type"), hidden, heads, head_dim)
    if not engines:
        return ()
    combination = ""
    if not growth.converts and before["query_head"] * before["head_dim"] == before["hidden"]:
        factor = max(Fraction(sizes[axis], before[axis]) for axis in ("hidden", "query_head"))
        by = f"x{factor}" if factor.denominator == 1 else f"x{float(factor):g}"
        combination = f". --hidden {by} --heads {by} together load everywhere"
    return (
        f"head_dim = {head_dim} is not hidden_size / heads = {hidden} / {heads}: "
        f"{engines}{combination}",
    )
