"""Llama, Mistral and Granite: RMSNorm before each block, gated FFN, grouped-query attention.

Source: transformers ``models/{llama,mistral,granite}`` (5.23). Granite's four multipliers are
stored numbers, not functions of a size, so growth keeps them.
"""

from __future__ import annotations

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
