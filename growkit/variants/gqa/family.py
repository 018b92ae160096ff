"""Grouped-query attention of our own model type: a Llama or Qwen 3, name for name."""

from __future__ import annotations

from typing import Any

from growkit.families.base import Config, required
from growkit.families.decoder import attention_tensors, evenly_shared, flag, head_norm_tensors
from growkit.families.unit_layout import Sizes
from growkit.variants.shared.decoder_family import common_fields, common_sizes, variant


def head_sizes(config: Config) -> dict[str, int]:
    """Query heads, and the key/value heads that they share."""
    return common_sizes(config) | {
        "query_head": required(config, "num_attention_heads"),
        "kv_head": required(config, "num_key_value_heads"),
    }


def head_fields(sizes: Sizes) -> dict[str, Any]:
    """Their config fields."""
    return common_fields(sizes, sizes["query_head"], sizes["kv_head"])


GQA = variant(
    "gqa",
    (*attention_tensors(), *head_norm_tensors(when=flag("qk_norm"))),
    head_sizes,
    head_fields,
    links=(evenly_shared("query_head", "kv_head"),),
    kv_elements=lambda sizes: 2 * sizes["kv_head"] * sizes["head_dim"],
    attention_flops=lambda sizes: 4 * sizes["query_head"] * sizes["head_dim"],
)
