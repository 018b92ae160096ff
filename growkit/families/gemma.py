"""Gemma 2 and Gemma 3 (text): norms before and after each block, alternating attention windows.

Source: transformers ``models/{gemma2,gemma3}`` (5.23). Norms store w and multiply by 1 + w; the
embedding is multiplied by sqrt(hidden_size); the softmax scale is the stored number
``query_pre_attn_scalar``, so no size changes it.
"""

from __future__ import annotations

from growkit.families.base import Tensor
from growkit.families.decoder import (
    LAYER,
    attention_tensors,
    decoder,
    full_attention_every,
    gated_ffn_tensors,
    head_norm_tensors,
    hidden_holds_heads,
    norm,
    norm_shared_with_heads,
    outer_tensors,
    sizes_with,
)
from growkit.families.head_dim_rules import HEAD_NORM, HeadDimRule

GAIN_OFFSET = 1.0
DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}


def _norm(role: str, name: str, closes_block: bool = False) -> Tensor:
    return norm(role, LAYER + name, gain_offset=GAIN_OFFSET, closes_block=closes_block)


TENSORS = (
    *outer_tensors(GAIN_OFFSET),
    _norm("input_norm", "input_layernorm.weight"),
    *attention_tensors(writes_residual=False),
    _norm("attention_post_norm", "post_attention_layernorm.weight", closes_block=True),
    _norm("ffn_norm", "pre_feedforward_layernorm.weight"),
    *gated_ffn_tensors(writes_residual=False),
    _norm("ffn_post_norm", "post_feedforward_layernorm.weight", closes_block=True),
)
GEMMA2 = decoder(
    "gemma2",
    TENSORS,
    sizes_with(DEFAULTS, {"mlp_bias": 0}),
    refusal=hidden_holds_heads("Gemma2Config"),
    layer_rules={"layer_types": full_attention_every(2)},
    sqrt_embedding_scale=True,
)
GEMMA3 = decoder(
    "gemma3",
    (*TENSORS, *head_norm_tensors(GAIN_OFFSET)),
    sizes_with(DEFAULTS, {"mlp_bias": 0}),
    model_type="gemma3_text",
    refusal=hidden_holds_heads("Gemma3TextConfig"),
    layer_rules={"layer_types": full_attention_every(6, "sliding_window_pattern")},
    norm=norm_shared_with_heads(),
    head_dim=HeadDimRule(HEAD_NORM),
    sqrt_embedding_scale=True,
)
