"""What ordinary decoders share: query heads in groups, a gated FFN, norms around both blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from growkit.families.base import (
    Config,
    Dim,
    Family,
    LayerRule,
    Link,
    Norm,
    Tensor,
    always,
    consumes,
    layer_count,
    normalises,
    produces,
    required,
)
from growkit.families.unit_layout import (
    IntArray,
    Sizes,
    fixed,
    head_dim,
    one,
    plain,
    sections,
    split_parts,
)

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
vocab = produces(plain("vocab"))
hidden_out = produces(plain("hidden"))
hidden_in = consumes(plain("hidden"))
hidden_normed = normalises(plain("hidden"))
ffn_out = produces(plain("ffn"))
ffn_in = consumes(plain("ffn"))
gate_up_rows = produces(split_parts("ffn", 2, one))  # all gates, then all ups
query_rows = produces(plain("query_head", head_dim))
kv_rows = produces(plain("kv_head", head_dim))
key_rows = produces(plain("kv_head", head_dim), keys=(("kv_head", 0),))
# q, k and v in one matrix; (axis, part) of the units.
QKV_PARTS = (("query_head", 0), ("kv_head", 0), ("kv_head", 1))
KEY_PART = QKV_PARTS[1]
fused_qkv = produces(sections(QKV_PARTS, head_dim), keys=(KEY_PART,))
query_columns = consumes(plain("query_head", head_dim))


def flag(name: str) -> Callable[[Sizes], bool]:
    """The tensor exists when this fact of the sizes is non-zero."""
    return lambda sizes: bool(sizes[name])


def untied(sizes: Sizes) -> bool:
    """An untied model stores its own output projection."""
    return not sizes["tied"]


# -- tensors --------------------------------------------------------------------------------------


def norm(role: str, name: str, *, gain_offset: float = 0.0, closes_block: bool = False) -> Tensor:
    """Gain [hidden] of an RMSNorm.

    Args:
        role: its role.
        name: name in the checkpoint.
        gain_offset: the gain is the stored value plus this.
        closes_block: the norm is the last thing before its block joins the residual stream.
    """
    init = "zeros" if gain_offset else "ones"
    return Tensor(role, name, (hidden_normed,), always, closes_block, init, gain_offset)


def outer_tensors(gain_offset: float = 0.0) -> tuple[Tensor, ...]:
    """Embedding, final norm and output projection of a Llama-like model."""
    return (
        Tensor("embed", "model.embed_tokens.weight", (vocab, hidden_out)),
        norm("final_norm", "model.norm.weight", gain_offset=gain_offset),
        Tensor("lm_head", "lm_head.weight", (vocab, hidden_in), when=untied),
    )


def norm_tensors() -> tuple[Tensor, ...]:
    """The two RMSNorms in front of the blocks of a layer."""
    return (
        norm("input_norm", LAYER + "input_layernorm.weight"),
        norm("ffn_norm", LAYER + "post_attention_layernorm.weight"),
    )


def attention_tensors(
    query: Dim = query_rows,
    key: Dim = key_rows,
    value: Dim = kv_rows,
    columns: Dim = query_columns,
    *,
    writes_residual: bool = True,
) -> tuple[Tensor, ...]:
    """q, k, v, o and their biases.

    Args:
        query, key, value: rows of q, k and v.
        columns: of o.
        writes_residual: o_proj's output joins the residual stream as it is (no norm after it).
    """
    bias, output_bias = flag("attention_bias"), flag("output_bias")
    return (
        Tensor("q", ATTENTION + "q_proj.weight", (query, hidden_in)),
        Tensor("k", ATTENTION + "k_proj.weight", (key, hidden_in)),
        Tensor("v", ATTENTION + "v_proj.weight", (value, hidden_in)),
        output_projection(columns, writes_residual=writes_residual),
        Tensor("q_bias", ATTENTION + "q_proj.bias", (query,), bias, init="zeros"),
        Tensor("k_bias", ATTENTION + "k_proj.bias", (key,), bias, init="zeros"),
        Tensor("v_bias", ATTENTION + "v_proj.bias", (value,), bias, init="zeros"),
        Tensor(
            "o_bias",
            ATTENTION + "o_proj.bias",
            (hidden_out,),
            output_bias,
            writes_residual,
            init="zeros",
        ),
    )


def output_projection(columns: Dim = query_columns, *, writes_residual: bool = True) -> Tensor:
    """o_proj [hidden, query heads x head_dim], or with other ``columns``."""
    name = ATTENTION + "o_proj.weight"
    return Tensor("o", name, (hidden_out, columns), writes_residual=writes_residual)


def down_projection(*, writes_residual: bool = True) -> Tensor:
    """down_proj [hidden, ffn]."""
    name = LAYER + "mlp.down_proj.weight"
    return Tensor("down", name, (hidden_out, ffn_in), writes_residual=writes_residual)


def gated_ffn_tensors(*, writes_residual: bool = True) -> tuple[Tensor, ...]:
    """gate, up and down of a gated FFN."""
    return (
        Tensor("gate", LAYER + "mlp.gate_proj.weight", (ffn_out, hidden_in)),
        Tensor("up", LAYER + "mlp.up_proj.weight", (ffn_out, hidden_in)),
        down_projection(writes_residual=writes_residual),
    )


def ffn_biases() -> tuple[Tensor, ...]:
    """Biases of gate, up and down."""
    bias = flag("mlp_bias")
    return (
        Tensor("gate_bias", LAYER + "mlp.gate_proj.bias", (ffn_out,), bias, init="zeros"),
        Tensor("up_bias", LAYER + "mlp.up_proj.bias", (ffn_out,), bias, init="zeros"),
        Tensor("down_bias", LAYER + "mlp.down_proj.bias", (hidden_out,), bias, True, "zeros"),
    )


def norm_shared_with_heads(eps: float = 1e-6) -> Norm:
    """RMSNorms whose rms_norm_eps the norms of query and key heads read too."""
    inputs = ("q", "k", "q_bias", "k_bias")
    return Norm("rms_norm_eps", eps, False, "the norms of query and key heads", inputs)


def head_norm_tensors(
    gain_offset: float = 0.0, when: Callable[[Sizes], bool] = always
) -> tuple[Tensor, ...]:
    """RMSNorm of every query and key head by itself: one gain [head_dim] for all heads."""
    gain = (produces(fixed(head_dim)),)
    init = "zeros" if gain_offset else "ones"
    return tuple(
        Tensor(role, ATTENTION + role + ".weight", gain, when, init=init, gain_offset=gain_offset)
        for role in ("q_norm", "k_norm")
    )


# -- sizes and config fields ----------------------------------------------------------------------


def basic_sizes(config: Config) -> dict[str, int]:
    """The axis sizes that every Llama-like config states."""
    return {
        "layer": layer_count(config),
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


def sizes_with(
    defaults: Config | None = None, facts: Mapping[str, int] | None = None
) -> Callable[[Config], dict[str, int]]:
    """Sizes of an ordinary decoder.

    Args:
        defaults: what the family's class assumes for fields that config.json leaves out.
        facts: facts that hold whatever the config says (``attention_bias`` of Qwen2).
    """

    def sizes(config: Config) -> dict[str, int]:
        stated = {**(defaults or {}), **config}
        heads = required(stated, "num_attention_heads")
        basic = basic_sizes(stated)
        dim = stated.get("head_dim") or basic["hidden"] // heads
        bias = int(bool(stated.get("attention_bias")))
        return (
            basic
            | {
                "query_head": heads,
                "kv_head": stated.get("num_key_value_heads") or heads,
                "head_dim": dim,
                "value_dim": dim,
                "attention_bias": bias,
                "output_bias": bias,
                "mlp_bias": int(bool(stated.get("mlp_bias"))),
            }
            | dict(facts or {})
        )

    return sizes


def head_fields(sizes: Sizes) -> dict[str, Any]:
    """The config fields of :func:`sizes_with`."""
    return basic_fields(sizes) | {
        "num_attention_heads": sizes["query_head"],
        "num_key_value_heads": sizes["kv_head"],
        "head_dim": sizes["head_dim"],
    }


NO_BIASES = {"attention_bias": 0, "output_bias": 0, "mlp_bias": 0}


def hidden_holds_heads(class_name: str) -> Callable[[Config, Sizes], str | None]:
    """Objection of config classes that want hidden_size to be a multiple of the query heads."""

    def refusal(config: Config, sizes: Sizes) -> str | None:
        if sizes["hidden"] % sizes["query_head"]:
            return (
                f"{class_name} refuses hidden_size {sizes['hidden']} with num_attention_heads "
                f"{sizes['query_head']}: it has to divide, even with an explicit head_dim"
            )
        return None

    return refusal


def full_attention_every(period: int, stated_by: str | None = None) -> LayerRule:
    """``layer_types`` with full attention in every ``period``-th layer, windows in the others.

    ``stated_by`` names a config field that overrides the period.
    """

    def rule(config: Config, layers: int) -> list[str]:
        every = (config.get(stated_by) if stated_by else None) or period
        return [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(layers)
        ]

    return rule


def evenly_shared(source: str, target: str) -> Link:
    """Consecutive units of ``source`` share one unit of ``target``."""

    def indices(sizes: Sizes) -> IntArray:
        return (np.arange(sizes[source]) * sizes[target] // sizes[source]).reshape(-1, 1)

    return Link(source, target, indices)


def decoder(
    name: str,
    tensors: tuple[Tensor, ...],
    sizes: Callable[[Config], dict[str, int]],
    *,
    model_type: str | None = None,
    config_fields: Callable[[Sizes], dict[str, Any]] = head_fields,
    **facts: Any,
) -> Family:
    """A family of ordinary decoders with grouped-query attention.

    Args:
        name: our name.
        tensors: its tensors.
        sizes: from :func:`sizes_with`.
        model_type: of config.json, when it is not the name.
        config_fields: the config fields that hold the sizes.
        facts: further attributes of :class:`Family`.
    """
    return Family(
        name=name,
        model_types=(model_type or name,),
        tensors=tensors,
        links=(evenly_shared("query_head", "kv_head"),),
        sizes=sizes,
        config_fields=config_fields,
        kv_elements=lambda sizes: 2 * sizes["kv_head"] * sizes["head_dim"],
        attention_flops=lambda sizes: 4 * sizes["query_head"] * sizes["head_dim"],
        **facts,
    )
