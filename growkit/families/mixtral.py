"""Mixtral: Mistral with experts in the place of the FFN of every layer.

Source: transformers ``models/mixtral`` (5.23). The router's probabilities of the chosen experts are
always renormalised to sum to one.
"""

from __future__ import annotations

from typing import Any

from growkit.families.base import Config, Norm
from growkit.families.decoder import (
    NO_BIASES,
    attention_tensors,
    decoder,
    head_fields,
    norm_tensors,
    outer_tensors,
    sizes_with,
)
from growkit.families.expert_tensors import aligned, expert_sizes, expert_tensors, stored_layout
from growkit.families.unit_layout import Sizes

DEFAULTS = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_decoder_sizes = sizes_with(DEFAULTS, NO_BIASES)


def _sizes(config: Config) -> dict[str, int]:
    sizes = _decoder_sizes(config)
    return sizes | expert_sizes({**DEFAULTS, **config}, "num_local_experts", sizes["layer"])


def _fields(sizes: Sizes) -> dict[str, Any]:
    return head_fields(sizes) | {
        "num_local_experts": sizes["expert"],
        "num_experts_per_tok": sizes["active_expert"],
    }


MIXTRAL = decoder(
    "mixtral",
    (
        *outer_tensors(),
        *norm_tensors(),
        *attention_tensors(),
        *expert_tensors(
            "block_sparse_moe.gate.weight", "block_sparse_moe.experts", "w1", "w3", "w2"
        ),
    ),
    _sizes,
    config_fields=_fields,
    norm=Norm(eps=1e-5),
    windows_everywhere=True,
    refusal=aligned("mixtral", "intermediate_size"),
    stored_facts=stored_layout,
)
