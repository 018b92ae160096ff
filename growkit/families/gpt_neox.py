"""GPT-NeoX and Pythia: q, k, v of a head side by side, rotation of a part of each head, LayerNorm.

Source: transformers ``models/gpt_neox`` (5.23). Rows of query_key_value: q, k, v of head 0, then of
head 1. With or without ``use_parallel_residual`` a block whose output projections and their biases
are zero adds nothing.
"""

from __future__ import annotations

from typing import Any

from growkit.families.base import Config, Norm, Tensor, always, layer_count, produces, required
from growkit.families.decoder import (
    KEY_PART,
    QKV_PARTS,
    ffn_in,
    ffn_out,
    flag,
    hidden_in,
    hidden_out,
    query_columns,
    untied,
    vocab,
)
from growkit.families.head_dim_rules import HeadDimRule, PartialRotary
from growkit.families.layer_norm import head_sizes, layer_norm, layer_norm_decoder, whole_heads
from growkit.families.unit_layout import Sizes, head_dim, interleaved

PREFIX = "gpt_neox."
LAYER = PREFIX + "layers.{layer}."
ATTENTION, FFN = LAYER + "attention.", LAYER + "mlp."
DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
}
qkv_rows = produces(interleaved(QKV_PARTS, head_dim), keys=(KEY_PART,))


def _sizes(config: Config) -> dict[str, int]:
    stated = {**DEFAULTS, **config}
    hidden = required(stated, "hidden_size")
    return {
        "layer": layer_count(stated),
        "hidden": hidden,
        "ffn": required(stated, "intermediate_size"),
        "vocab": required(stated, "vocab_size"),
        "tied": int(bool(config.get("tie_word_embeddings"))),
        "attention_bias": int(bool(config.get("attention_bias", True))),
        **head_sizes(hidden, required(stated, "num_attention_heads")),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_hidden_layers": sizes["layer"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_attention_heads": sizes["query_head"],
        "tie_word_embeddings": bool(sizes["tied"]),
    }


bias = flag("attention_bias")

GPT_NEOX = layer_norm_decoder(
    "gpt_neox",
    (
        Tensor("embed", PREFIX + "embed_in.weight", (vocab, hidden_out)),
        *layer_norm("input_norm", LAYER + "input_layernorm"),
        Tensor("qkv", ATTENTION + "query_key_value.weight", (qkv_rows, hidden_in)),
        Tensor("qkv_bias", ATTENTION + "query_key_value.bias", (qkv_rows,), bias, init="zeros"),
        Tensor("o", ATTENTION + "dense.weight", (hidden_out, query_columns), always, True),
        Tensor("o_bias", ATTENTION + "dense.bias", (hidden_out,), bias, True, "zeros"),
        *layer_norm("ffn_norm", LAYER + "post_attention_layernorm"),
        Tensor("up", FFN + "dense_h_to_4h.weight", (ffn_out, hidden_in)),
        Tensor("up_bias", FFN + "dense_h_to_4h.bias", (ffn_out,), init="zeros"),
        Tensor("down", FFN + "dense_4h_to_h.weight", (hidden_out, ffn_in), always, True),
        Tensor("down_bias", FFN + "dense_4h_to_h.bias", (hidden_out,), always, True, "zeros"),
        *layer_norm("final_norm", PREFIX + "final_layer_norm"),
        Tensor("lm_head", "embed_out.weight", (vocab, hidden_in), when=untied),
    ),
    _sizes,
    config_fields=_fields,
    refusal=whole_heads("GPTNeoX", "hidden_size"),
    norm=Norm("layer_norm_eps", 1e-5, centred=True),
    head_dim=HeadDimRule(rotary=PartialRotary("rotary_pct", 0.25)),
    # Causal masks and tables of angles.
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
