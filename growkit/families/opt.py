"""OPT: learned positions with two unused ones in front, LayerNorm with a constant epsilon.

Source: transformers ``models/opt`` (5.23). The norms have the 1e-5 of torch, whatever the config
says. OPT-350m is another architecture: it normalises after each residual sum and projects narrower
embeddings.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Config, Norm, Tensor, always, layer_count, produces, required
from growkit.families.decoder import (
    ffn_in,
    ffn_out,
    flag,
    hidden_in,
    hidden_out,
    key_rows,
    kv_rows,
    query_columns,
    query_rows,
    untied,
    vocab,
)
from growkit.families.head_dim_rules import HeadDimRule
from growkit.families.layer_norm import head_sizes, layer_norm, layer_norm_decoder, whole_heads
from growkit.families.unit_layout import Sizes, fixed

PREFIX = "model."
DECODER = PREFIX + "decoder."
LAYER = DECODER + "layers.{layer}."
ATTENTION = LAYER + "self_attn."
OFFSET = 2
DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
}


def _sizes(config: Config) -> dict[str, int]:
    stated = {**DEFAULTS, **config}
    hidden = required(stated, "hidden_size")
    if not config.get("do_layer_norm_before", True):
        raise UsageError(
            "config.json has do_layer_norm_before = false, as OPT-350m has.",
            "Norms after the residual sum are not supported; every other OPT is.",
        )
    if (config.get("word_embed_proj_dim") or hidden) != hidden:
        raise UsageError(
            f"config.json has word_embed_proj_dim = {config['word_embed_proj_dim']} with "
            f"hidden_size {hidden}.",
            "Projected embeddings are not supported (of the published models OPT-350m alone has "
            "them).",
        )
    if config.get("_remove_final_layer_norm") or not config.get(
        "layer_norm_elementwise_affine", True
    ):
        raise UsageError(
            "config.json describes an OPT without final norm or without gains in its norms.",
            "Only OPT with ordinary norms is supported, as all published models but 350m are.",
        )
    return {
        "layer": layer_count(stated),
        "hidden": hidden,
        "ffn": required(stated, "ffn_dim"),
        "vocab": required(stated, "vocab_size"),
        "positions": required(stated, "max_position_embeddings"),
        "tied": int(bool(config.get("tie_word_embeddings", True))),
        "bias": int(bool(config.get("enable_bias", True))),
        **head_sizes(hidden, required(stated, "num_attention_heads")),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_hidden_layers": sizes["layer"],
        "hidden_size": sizes["hidden"],
        "word_embed_proj_dim": sizes["hidden"],
        "ffn_dim": sizes["ffn"],
        "num_attention_heads": sizes["query_head"],
        "tie_word_embeddings": bool(sizes["tied"]),
    }


bias = flag("bias")
positions = produces(fixed(lambda sizes: sizes["positions"] + OFFSET))

OPT = layer_norm_decoder(
    "opt",
    (
        Tensor("embed", DECODER + "embed_tokens.weight", (vocab, hidden_out)),
        Tensor("positions", DECODER + "embed_positions.weight", (positions, hidden_out)),
        *layer_norm("input_norm", LAYER + "self_attn_layer_norm"),
        Tensor("q", ATTENTION + "q_proj.weight", (query_rows, hidden_in)),
        Tensor("k", ATTENTION + "k_proj.weight", (key_rows, hidden_in)),
        Tensor("v", ATTENTION + "v_proj.weight", (kv_rows, hidden_in)),
        Tensor("o", ATTENTION + "out_proj.weight", (hidden_out, query_columns), always, True),
        Tensor("q_bias", ATTENTION + "q_proj.bias", (query_rows,), bias, init="zeros"),
        Tensor("k_bias", ATTENTION + "k_proj.bias", (key_rows,), bias, init="zeros"),
        Tensor("v_bias", ATTENTION + "v_proj.bias", (kv_rows,), bias, init="zeros"),
        Tensor("o_bias", ATTENTION + "out_proj.bias", (hidden_out,), bias, True, "zeros"),
        *layer_norm("ffn_norm", LAYER + "final_layer_norm"),
        Tensor("up", LAYER + "fc1.weight", (ffn_out, hidden_in)),
        Tensor("up_bias", LAYER + "fc1.bias", (ffn_out,), bias, init="zeros"),
        Tensor("down", LAYER + "fc2.weight", (hidden_out, ffn_in), always, True),
        Tensor("down_bias", LAYER + "fc2.bias", (hidden_out,), bias, True, "zeros"),
        *layer_norm("final_norm", DECODER + "final_layer_norm"),
        Tensor("lm_head", "lm_head.weight", (vocab, hidden_in), when=untied),
    ),
    _sizes,
    config_fields=_fields,
    refusal=whole_heads("OPT", "hidden_size"),
    norm=Norm(None, 1e-5, centred=True),
    head_dim=HeadDimRule(),
    prefix=PREFIX,
)
