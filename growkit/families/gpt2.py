"""GPT-2: matrices stored [in, out], q, k and v in one, learned positions, LayerNorm.

Source: transformers ``models/gpt2`` (5.23). ``n_inner`` null means four times the hidden size. The
published files lack the prefix ``transformer.`` that the class writes; both are read, and written
as they were.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import (
    Config,
    Norm,
    Tensor,
    always,
    layer_count,
    produces,
    required,
)
from growkit.families.decoder import (
    ffn_in,
    ffn_out,
    fused_qkv,
    hidden_in,
    hidden_out,
    query_columns,
    untied,
    vocab,
)
from growkit.families.head_dim_rules import HeadDimRule
from growkit.families.layer_norm import head_sizes, layer_norm, layer_norm_decoder, whole_heads
from growkit.families.unit_layout import Sizes, fixed

PREFIX = "transformer."
LAYER = PREFIX + "h.{layer}."
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}
UNKNOWN = {
    "add_cross_attention": "Only the decoder by itself is supported.",
    "scale_attn_by_inverse_layer_idx": "Scores that depend on the layer's index are not supported.",
}


def _sizes(config: Config) -> dict[str, int]:
    for field, remedy in UNKNOWN.items():
        if config.get(field):
            raise UsageError(f"config.json has {field} = true.", remedy)
    stated = {**DEFAULTS, **config}
    hidden = required(stated, "n_embd")
    return {
        "layer": layer_count(stated, "n_layer"),
        "hidden": hidden,
        "ffn": config.get("n_inner") or 4 * hidden,
        "vocab": required(stated, "vocab_size"),
        "positions": required(stated, "n_positions"),
        "tied": int(bool(config.get("tie_word_embeddings", True))),
        **head_sizes(hidden, required(stated, "n_head")),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    usual = sizes["ffn"] == 4 * sizes["hidden"]
    return {
        "n_layer": sizes["layer"],
        "n_embd": sizes["hidden"],
        "n_head": sizes["query_head"],
        "n_inner": None if usual else sizes["ffn"],
        "tie_word_embeddings": bool(sizes["tied"]),
    }


positions = produces(fixed(lambda sizes: sizes["positions"]))

GPT2 = layer_norm_decoder(
    "gpt2",
    (
        Tensor("embed", PREFIX + "wte.weight", (vocab, hidden_out)),
        Tensor("positions", PREFIX + "wpe.weight", (positions, hidden_out)),
        *layer_norm("input_norm", LAYER + "ln_1"),
        Tensor("qkv", LAYER + "attn.c_attn.weight", (hidden_in, fused_qkv)),
        Tensor("qkv_bias", LAYER + "attn.c_attn.bias", (fused_qkv,), init="zeros"),
        Tensor("o", LAYER + "attn.c_proj.weight", (query_columns, hidden_out), always, True),
        Tensor("o_bias", LAYER + "attn.c_proj.bias", (hidden_out,), always, True, "zeros"),
        *layer_norm("ffn_norm", LAYER + "ln_2"),
        Tensor("up", LAYER + "mlp.c_fc.weight", (hidden_in, ffn_out)),
        Tensor("up_bias", LAYER + "mlp.c_fc.bias", (ffn_out,), init="zeros"),
        Tensor("down", LAYER + "mlp.c_proj.weight", (ffn_in, hidden_out), always, True),
        Tensor("down_bias", LAYER + "mlp.c_proj.bias", (hidden_out,), always, True, "zeros"),
        *layer_norm("final_norm", PREFIX + "ln_f"),
        Tensor("lm_head", "lm_head.weight", (vocab, hidden_in), when=untied),
    ),
    _sizes,
    config_fields=_fields,
    refusal=whole_heads("GPT2", "n_embd"),
    norm=Norm("layer_norm_epsilon", 1e-5, centred=True),
    head_dim=HeadDimRule(scaled=lambda config: config.get("scale_attn_weights", True)),
    prefix=PREFIX,
    # Causal masks.
    ignored=(r".*\.attn\.(bias|masked_bias)",),
)
