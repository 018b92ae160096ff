"""Ordinary attention -> DIFF V2, or token-gated GDA: duplicate the query heads, gate at one half.

Every query head i becomes ``ratio`` signal heads and one noise head, all copies of it, in one group
on the same key/value head. lambda_proj is 0, so the gate is sigmoid(0) = 1/2 and each signal head
gives a - a / 2; W_O times 2 (shared among the copies) returns a. Keys, values, head norms, rotary
encoding and the KV cache are untouched. Bit-exact for one signal head a noise head (powers of two
only); more signal heads share W_O by the symmetry, which is exact.

The two maps of a pair get gradients 2 : -1, so they separate at the first step.
Source: huggingface.co/blog/microsoft/diff-attn-v2 for the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Alias, Effect, Exactness, ModelShape, Operator
from growkit.variants.request import ConversionRequest
from growkit.variants.shared.from_ordinary import check_ordinary, growkit_fields


@dataclass(frozen=True)
class ToGated:
    """To ``attention`` (``diff_v2`` or ``gda_gated``) with ``ratio`` signal heads a noise head."""

    attention: str
    ratio: int = 1

    def apply(self, shape: ModelShape) -> Effect:
        check_ordinary(shape)
        heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
        signal = heads * self.ratio
        fields = {"num_attention_heads": signal + heads, "num_key_value_heads": kv}
        if self.attention == "gda_gated":
            fields["num_noise_heads"] = heads
        return Effect(
            config=growkit_fields(shape, self.attention) | fields,
            summary=f"{heads} query heads -> {signal} signal heads and {heads} noise heads, copies "
            "gated at 1/2",
            exactness=Exactness.BIT_EXACT if self.ratio == 1 else Exactness.EXACT,
            reason="2 W_O (a - a / 2) = W_O a",
            aliases={"signal_head": Alias("query_head"), "noise_head": Alias("query_head")},
            axes={
                "signal_head": AxisMap.spread(heads, signal),
                "noise_head": AxisMap.identity(heads),
            },
            factors={"o": 2.0},
            starts={"lambda_proj": "zeros"},
        )


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "gda_gated": lambda request: ToGated("gda_gated", request.ratio or 1),
    "diff_v2": lambda request: ToGated("diff_v2"),
}
