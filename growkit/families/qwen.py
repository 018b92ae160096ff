"""Qwen2 and Qwen3: Llama with biases on q, k and v (2), or a norm in every query and key head (3).

Source: transformers ``models/{qwen2,qwen3}`` (5.23).
"""

from __future__ import annotations

from growkit.families.base import Config
from growkit.families.decoder import (
    attention_tensors,
    decoder,
    gated_ffn_tensors,
    head_norm_tensors,
    norm_shared_with_heads,
    norm_tensors,
    outer_tensors,
    sizes_with,
)
from growkit.families.head_dim import HEAD_NORM, HeadDimRule


def _layer_types(config: Config, layers: int) -> list[str]:
    """The class's rule: full attention in the first ``max_window_layers``, then windows."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    return [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(layers)
    ]


QWEN2 = decoder(
    "qwen2",
    (*outer_tensors(), *norm_tensors(), *attention_tensors(), *gated_ffn_tensors()),
    sizes_with({"num_key_value_heads": 32}, {"attention_bias": 1, "output_bias": 0, "mlp_bias": 0}),
    layer_rules={"layer_types": _layer_types},
    layer_counts=("max_window_layers",),
)
QWEN3 = decoder(
    "qwen3",
    (
        *outer_tensors(),
        *norm_tensors(),
        *attention_tensors(),
        *head_norm_tensors(),
        *gated_ffn_tensors(),
    ),
    sizes_with({"num_key_value_heads": 32, "head_dim": 128}, {"mlp_bias": 0}),
    norm=norm_shared_with_heads(),
    head_dim=HeadDimRule(HEAD_NORM),
    layer_rules={"layer_types": _layer_types},
    layer_counts=("max_window_layers",),
)
