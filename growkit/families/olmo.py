"""OLMo 2 and 3: no norm in front of the blocks, one after each, q and k normed over all heads."""

from __future__ import annotations

from growkit.families.base import Tensor
from growkit.families.decoder import (
    ATTENTION,
    LAYER,
    attention_tensors,
    decoder,
    full_attention_every,
    gated_ffn_tensors,
    kv_rows,
    norm,
    norm_shared_with_heads,
    outer_tensors,
    query_rows,
    sizes_with,
)
from growkit.families.head_dim_rules import HEAD_NORM, HeadDimRule
from growkit.families.unit_layout import Sizes

TENSORS = (
    *outer_tensors(),
    *attention_tensors(writes_residual=False),
    Tensor("q_norm", ATTENTION + "q_norm.weight", (query_rows,), init="ones"),
    Tensor("k_norm", ATTENTION + "k_norm.weight", (kv_rows,), init="ones"),
    norm("attention_post_norm", LAYER + "post_attention_layernorm.weight", closes_block=True),
    *gated_ffn_tensors(writes_residual=False),
    norm("ffn_post_norm", LAYER + "post_feedforward_layernorm.weight", closes_block=True),
)


NORM = norm_shared_with_heads(1e-5)


def heads_normed_together(sizes: Sizes) -> tuple[str, ...]:
    """The norms over all heads keep their mean square only if all are copied equally often."""
    return ("query_head", "kv_head")


OLMO2 = decoder(
    "olmo2",
    TENSORS,
    sizes_with(facts={"mlp_bias": 0}),
    norm=NORM,
    head_dim=HeadDimRule(HEAD_NORM),
    full_copies_only=heads_normed_together,
)


OLMO3 = decoder(
    "olmo3",
    TENSORS,
    sizes_with(facts={"mlp_bias": 0}),
    norm=NORM,
    head_dim=HeadDimRule(HEAD_NORM),
    full_copies_only=heads_normed_together,
    layer_rules={"layer_types": full_attention_every(4)},
)
