"""Ordinary attention -> DIFF V1 with its norm: another function, to be trained.

(A checkpoint of another differential format becomes DIFF V1 exactly: see ``differential.py``.)

The projections keep their bytes: query heads 2i and 2i + 1 become the two maps of head i, key and
value heads likewise (the same counts as a Llama's, DIFF Transformer section 3). The lambda vectors
and the norm of every head begin as in a new model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from growkit.core.errors import UsageError
from growkit.families.lambda_schedule import lambda_init_schedule
from growkit.surgery.effect import Effect, Exactness, ModelShape, Operator
from growkit.variants.diffllama.convert import OWN_KEYS, ToDifferential
from growkit.variants.request import ConversionRequest
from growkit.variants.shared.from_ordinary import check_ordinary, growkit_fields


@dataclass(frozen=True)
class ToDiffV1:
    """To DIFF V1 of the same parameter count."""

    def apply(self, shape: ModelShape) -> Effect:
        if shape.family.name in OWN_KEYS:
            return ToDifferential("diff_v1").apply(shape)
        check_ordinary(shape)
        heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
        if heads % 2 or kv % 2:
            raise UsageError(
                f"{heads} query and {kv} key/value heads make no pairs.",
                "Double the key/value heads first: growkit grow --kv-heads x2, and --query-heads.",
            )
        return Effect(
            config=growkit_fields(shape, "diff_v1")
            | {
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
                "sub_layer_norm": True,
                "attn_rms_norm_eps": 1e-5,
                "lambda_init": lambda_init_schedule(shape.sizes["layer"]),
            },
            summary=f"{heads} query heads -> {heads // 2} pairs, with the norm of every head",
            exactness=Exactness.NOT_EXACT,
            reason="the norm of every head changes the function whatever lambda is",
            verbatim=frozenset(("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias")),
            warnings=("nothing of the attention is preserved: this is a start for training",),
        )


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "diff_v1": lambda request: ToDiffV1(),
}
