"""Llama, Mistral and Granite: RMSNorm before each block, gated FFN, grouped-query attention.

Source: transformers ``models/{llama,mistral,granite}`` (5.23). Granite's four multipliers are
stored numbers, not functions of a size, so growth keeps them.
"""

from __future__ import annotations

from growkit.families.base import Config
from growkit.families.decoder import (
    NO_BIASES,
    attention_tensors,
    decoder,
    ffn_biases,
    gated_ffn_tensors,
    hidden_holds_heads,
    norm_tensors,
    outer_tensors,
    sizes_with,
)

LLAMA_TENSORS = (
    *outer_tensors(),
    *norm_tensors(),
    *attention_tensors(),
    *gated_ffn_tensors(),
    *ffn_biases(),
)

LLAMA = decoder(
    "llama",
    LLAMA_TENSORS,
    sizes_with(),
    refusal=hidden_holds_heads("LlamaConfig"),
)
MISTRAL = decoder(
    "mistral",
    LLAMA_TENSORS,
    sizes_with({"num_key_value_heads": 8}, NO_BIASES),
    windows_everywhere=True,
)
GRANITE = decoder("granite", LLAMA_TENSORS, sizes_with())


def _no_rope_layers(config: Config, layers: int) -> list[int]:
    """1 where the layer has RoPE: all but every ``no_rope_layer_interval``-th."""
    interval = config.get("no_rope_layer_interval", 4)
    return [int((layer + 1) % interval != 0) for layer in range(layers)]


def _layer_types(config: Config, layers: int) -> list[str]:
    """Windows, when they are used, in the layers without RoPE."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    has_rope = config.get("no_rope_layers") or _no_rope_layers(config, layers)
    return [
        "sliding_attention" if window is not None and not has_rope[layer] else "full_attention"
        for layer in range(layers)
    ]


SMOLLM3 = decoder(
    "smollm3",
    LLAMA_TENSORS,
    sizes_with({"num_key_value_heads": 4, "tie_word_embeddings": True}),
    per_layer_fields=("no_rope_layers", "layer_types"),
    layer_rules={"no_rope_layers": _no_rope_layers, "layer_types": _layer_types},
)
