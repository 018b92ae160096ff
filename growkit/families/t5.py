"""T5 and mT5: an encoder and a decoder, RMSNorm, relative position biases, no softmax scale.

Source: transformers ``models/t5`` and ``models/mt5`` (5.23); v1.0 (relu, ``wi``) and v1.1, FLAN or
mT5 (gated, ``wi_0`` and ``wi_1``). Every query head has a key/value head of its own; scores are not
divided by the size of a head. Each stack stores its position bias, one column a head, in block 0
and hands it on, so growth of depth leaves block 0 first.

The class ties ``lm_head`` to ``shared`` unless a checkpoint stores other values under that name,
whatever its config says; so the stored names decide. ``tie_word_embeddings: false`` (or
``scale_decoder_outputs: false``) means that the last hidden state is not divided by sqrt(d_model);
that of mT5 never is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from growkit.families.base import (
    Config,
    Dim,
    Family,
    Norm,
    Stack,
    Tensor,
    always,
    consumes,
    produces,
    required,
)
from growkit.families.decoder import (
    evenly_shared,
    ffn_in,
    ffn_out,
    flag,
    hidden_in,
    hidden_normed,
    hidden_out,
    key_rows,
    kv_rows,
    query_columns,
    query_rows,
    untied,
    vocab,
)
from growkit.families.head_dim_rules import HeadDimRule
from growkit.families.unit_layout import Sizes, fixed, plain

ENCODER, DECODER = "layer", "decoder_layer"
DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "relu",
}
MT5_DEFAULTS = DEFAULTS | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}


def _sizes(config: Config) -> dict[str, int]:
    multilingual = config.get("model_type") == "mt5"
    stated = {**(MT5_DEFAULTS if multilingual else DEFAULTS), **config}
    layers, heads = required(stated, "num_layers"), required(stated, "num_heads")
    if stated.get("num_decoder_layers") is None:
        stated["num_decoder_layers"] = layers
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return {
        "layer": layers,
        "decoder_layer": required(stated, "num_decoder_layers"),
        "hidden": required(stated, "d_model"),
        "ffn": required(stated, "d_ff"),
        "query_head": heads,
        "kv_head": heads,
        "head_dim": required(stated, "d_kv"),
        "value_dim": required(stated, "d_kv"),
        "vocab": required(stated, "vocab_size"),
        "buckets": required(stated, "relative_attention_num_buckets"),
        "gated": int(str(stated["feed_forward_proj"]).startswith("gated-")),
        "scaled_head": int(bool(scaled) and not multilingual),
        "tied": int(config.get("tie_word_embeddings") is not False),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_layers": sizes["layer"],
        "num_decoder_layers": sizes["decoder_layer"],
        "d_model": sizes["hidden"],
        "d_ff": sizes["ffn"],
        "num_heads": sizes["query_head"],
        "d_kv": sizes["head_dim"],
    }


def _stored_facts(names: Collection[str]) -> dict[str, int]:
    return {"tied": int("lm_head.weight" not in names)}


def _refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["query_head"] != sizes["kv_head"]:
        return (
            f"T5 has one key/value head for each query head, not {sizes['kv_head']} for "
            f"{sizes['query_head']}; --heads grows both"
        )
    return None


def _norm(role: str, name: str, stack: str) -> Tensor:
    return Tensor(role, name, (hidden_normed,), init="ones", stack=stack)


def _attention(
    role: str, name: str, stack: str, keys: Dim = key_rows, values: Dim = kv_rows
) -> tuple[Tensor, ...]:
    """q, k, v, o and the norm in front of them; ``name`` is the block's, up to the module."""
    inside, outside = name + ".", name.rpartition(".")[0] + "."
    return (
        _norm(f"{role}input_norm", outside + "layer_norm.weight", stack),
        Tensor(f"{role}q", inside + "q.weight", (query_rows, hidden_in), stack=stack),
        Tensor(f"{role}k", inside + "k.weight", (keys, hidden_in), stack=stack),
        Tensor(f"{role}v", inside + "v.weight", (values, hidden_in), stack=stack),
        Tensor(
            f"{role}o", inside + "o.weight", (hidden_out, query_columns), always, True, stack=stack
        ),
    )


def _ffn(role: str, name: str, stack: str) -> tuple[Tensor, ...]:
    """The FFN and the norm in front of it; ``name`` is the block's."""
    inside, rows, gated = name + "DenseReluDense.", (ffn_out, hidden_in), flag("gated")
    return (
        _norm(f"{role}ffn_norm", name + "layer_norm.weight", stack),
        Tensor(f"{role}gate", inside + "wi_0.weight", rows, gated, stack=stack),
        Tensor(f"{role}up", inside + "wi_1.weight", rows, gated, stack=stack),
        Tensor(f"{role}in", inside + "wi.weight", rows, lambda s: not s["gated"], stack=stack),
        Tensor(
            f"{role}down", inside + "wo.weight", (hidden_out, ffn_in), always, True, stack=stack
        ),
    )


def _position_bias(role: str, stack: str) -> Tensor:
    """[buckets, heads]: a copied head is a copied column."""
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets = produces(fixed(lambda sizes: sizes["buckets"]))
    return Tensor(role, name, (buckets, produces(plain("query_head"))))


_BLOCK = "{stack}.block.{{layer}}.layer.{place}."
_ENCODER_BLOCKS = tuple(_BLOCK.format(stack="encoder", place=place) for place in range(2))
_DECODER_BLOCKS = tuple(_BLOCK.format(stack="decoder", place=place) for place in range(3))
SELF_ATTENTION = _DECODER_BLOCKS[0] + "SelfAttention"
CROSS_ATTENTION = _DECODER_BLOCKS[1] + "EncDecAttention"


def t5_tensors(encoder: tuple[Dim, Dim], decoder: tuple[Dim, Dim]) -> tuple[Tensor, ...]:
    """Every tensor of a T5 checkpoint.

    Args:
        encoder, decoder: rows of the keys and of the values in that stack.
    """
    return (
        Tensor("embed", "shared.weight", (vocab, hidden_out)),
        _position_bias("position_bias", "encoder"),
        *_attention("", _ENCODER_BLOCKS[0] + "SelfAttention", ENCODER, *encoder),
        *_ffn("", _ENCODER_BLOCKS[1], ENCODER),
        _norm("encoder_norm", "encoder.final_layer_norm.weight", ENCODER),
        _position_bias("decoder_position_bias", "decoder"),
        *_attention("decoder_", SELF_ATTENTION, DECODER, *decoder),
        *_attention("cross_", CROSS_ATTENTION, DECODER, *decoder),
        *_ffn("decoder_", _DECODER_BLOCKS[2], DECODER),
        _norm("final_norm", "decoder.final_layer_norm.weight", DECODER),
        Tensor("lm_head", "lm_head.weight", (vocab, consumes(plain("hidden"))), when=untied),
    )


T5 = Family(
    name="t5",
    model_types=("t5", "mt5"),
    tensors=t5_tensors((key_rows, kv_rows), (key_rows, kv_rows)),
    # A target token meets its own past and the whole source, in two caches.
    stacks=(Stack(ENCODER, attended=1.0, caches=0), Stack(DECODER, attended=1.5, caches=2)),
    links=(evenly_shared("query_head", "kv_head"),),
    sizes=_sizes,
    stored_facts=_stored_facts,
    ties_by_values=True,
    config_fields=_fields,
    kv_elements=lambda sizes: 2 * sizes["kv_head"] * sizes["head_dim"],
    attention_flops=lambda sizes: 4 * sizes["query_head"] * sizes["head_dim"],
    per_layer_fields=(),
    norm=Norm("layer_norm_epsilon"),
    head_dim=HeadDimRule(scaled=lambda config: False),
    sqrt_head_divisor=lambda sizes: bool(sizes["scaled_head"]),
    refusal=_refusal,
    aliases={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    # Early checkpoints store a bias for cross-attention too, which the class never reads.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
