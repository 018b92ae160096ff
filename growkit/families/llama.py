"""Llama: grouped-query attention, gated FFN, RMSNorm before each block.

Source: transformers ``models/llama`` (5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from growkit.families.base import Config, Family, Link, Tensor, consumes, produces, required
from growkit.families.layout import IntArray, Sizes, fixed, head_dim, plain

LAYER = "model.layers.{layer}."
vocab = produces(fixed(lambda sizes: sizes["vocab"]))
hidden_out = produces(plain("hidden"))
hidden_in = consumes(plain("hidden"))
ffn_out = produces(plain("ffn"))
ffn_in = consumes(plain("ffn"))


def flag(name: str) -> Callable[[Sizes], bool]:
    """The tensor exists when this fact of the sizes is non-zero."""
    return lambda sizes: bool(sizes[name])


def untied(sizes: Sizes) -> bool:
    """An untied model stores its own output projection."""
    return not sizes["tied"]


def outer_tensors() -> tuple[Tensor, ...]:
    """Embedding, final norm and output projection of a Llama-like model."""
    return (
        Tensor("embed", "model.embed_tokens.weight", (vocab, hidden_out)),
        Tensor("final_norm", "model.norm.weight", (hidden_out,), init="ones"),
        Tensor("lm_head", "lm_head.weight", (vocab, hidden_in), when=untied),
    )


def norm_tensors() -> tuple[Tensor, ...]:
    """The two RMSNorms in front of the blocks of a layer."""
    return (
        Tensor("input_norm", LAYER + "input_layernorm.weight", (hidden_out,), init="ones"),
        Tensor("ffn_norm", LAYER + "post_attention_layernorm.weight", (hidden_out,), init="ones"),
    )


def gated_ffn_tensors() -> tuple[Tensor, ...]:
    """gate, up and down of a gated FFN."""
    return (
        Tensor("gate", LAYER + "mlp.gate_proj.weight", (ffn_out, hidden_in)),
        Tensor("up", LAYER + "mlp.up_proj.weight", (ffn_out, hidden_in)),
        Tensor("down", LAYER + "mlp.down_proj.weight", (hidden_out, ffn_in), writes_residual=True),
    )


def basic_sizes(config: Config) -> dict[str, int]:
    """The axis sizes that every Llama-like config states."""
    return {
        "layer": required(config, "num_hidden_layers"),
        "hidden": required(config, "hidden_size"),
        "ffn": required(config, "intermediate_size"),
        "vocab": required(config, "vocab_size"),
        "tied": int(bool(config.get("tie_word_embeddings", False))),
    }


def basic_fields(sizes: Sizes) -> dict[str, Any]:
    """The config fields of :func:`basic_sizes`."""
    return {
        "num_hidden_layers": sizes["layer"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "tie_word_embeddings": bool(sizes["tied"]),
    }


def evenly_shared(source: str, target: str) -> Link:
    """Consecutive units of ``source`` share one unit of ``target``."""

    def indices(sizes: Sizes) -> IntArray:
        return (np.arange(sizes[source]) * sizes[target] // sizes[source]).reshape(-1, 1)

    return Link(source, target, indices)


def _sizes(config: Config) -> dict[str, int]:
    heads = required(config, "num_attention_heads")
    sizes = basic_sizes(config)
    dim = config.get("head_dim") or sizes["hidden"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return sizes | {
        "query_head": heads,
        "kv_head": kv_heads,
        "head_dim": dim,
        "value_dim": dim,
        "attention_bias": int(bias),
        "mlp_bias": int(mlp_bias),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return basic_fields(sizes) | {
        "num_attention_heads": sizes["query_head"],
        "num_key_value_heads": sizes["kv_head"],
        "head_dim": sizes["head_dim"],
    }


def _refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["hidden"] % sizes["query_head"]:
        return (
            f"LlamaConfig refuses hidden_size {sizes['hidden']} with num_attention_heads "
            f"{sizes['query_head']}: it has to divide, even with an explicit head_dim"
        )
    return None


query_rows = produces(plain("query_head", head_dim))
kv_rows = produces(plain("kv_head", head_dim))
query_columns = consumes(plain("query_head", head_dim))
_bias, _mlp_bias = flag("attention_bias"), flag("mlp_bias")
_attention = LAYER + "self_attn."

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    tensors=(
        *outer_tensors(),
        *norm_tensors(),
        Tensor("q", _attention + "q_proj.weight", (query_rows, hidden_in)),
        Tensor("k", _attention + "k_proj.weight", (kv_rows, hidden_in)),
        Tensor("v", _attention + "v_proj.weight", (kv_rows, hidden_in)),
        Tensor(
            "o", _attention + "o_proj.weight", (hidden_out, query_columns), writes_residual=True
        ),
        Tensor("q_bias", _attention + "q_proj.bias", (query_rows,), _bias, init="zeros"),
        Tensor("k_bias", _attention + "k_proj.bias", (kv_rows,), _bias, init="zeros"),
        Tensor("v_bias", _attention + "v_proj.bias", (kv_rows,), _bias, init="zeros"),
        Tensor("o_bias", _attention + "o_proj.bias", (hidden_out,), _bias, True, "zeros"),
        *gated_ffn_tensors(),
        Tensor("gate_bias", LAYER + "mlp.gate_proj.bias", (ffn_out,), _mlp_bias, init="zeros"),
        Tensor("up_bias", LAYER + "mlp.up_proj.bias", (ffn_out,), _mlp_bias, init="zeros"),
        Tensor("down_bias", LAYER + "mlp.down_proj.bias", (hidden_out,), _mlp_bias, True, "zeros"),
    ),
    links=(evenly_shared("query_head", "kv_head"),),
    sizes=_sizes,
    config_fields=_fields,
    kv_elements=lambda sizes: 2 * sizes["kv_head"] * sizes["head_dim"],
    attention_flops=lambda sizes: 4 * sizes["query_head"] * sizes["head_dim"],
    refusal=_refusal,
)
