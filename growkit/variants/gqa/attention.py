# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention, with multi-head (G = H) and multi-query attention (G = 1) as its ends.

    o_i = softmax(q_i k_g^T / sqrt(d)) v_g,   g = floor(i G / H),      y = W_O concat_i o_i

for the H ``num_attention_heads`` and G ``num_key_value_heads``: consecutive query heads share one
key/value head. Sources: arXiv 1706.03762, 1911.02150, 2305.13245; layout of transformers' Llama,
with the head norms of Qwen3 and the biases of Qwen2 as options.

Parameters of a layer: E d (2H + 2G); KV cache: 2 G d elements a token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..shared.definition import Definition
from ..shared.one_call import (
    HEADS_SPLIT,
    AttentionBase,
    OneCallAttention,
    Positions,
    ProjectionHeads,
    check_divides,
)


def gqa_reference(
    module: AttentionBase,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    config, d = module.config, module.head_dim
    outputs = []
    for i in range(config.num_attention_heads):
        kv = i * config.num_key_value_heads // config.num_attention_heads
        query = inputs.head(module.q_proj, i, d, module.q_norm, rotary=True)
        key = inputs.head(module.k_proj, kv, d, module.k_norm, rotary=True)
        outputs.append(inputs.attention_map(query, key) @ inputs.head(module.v_proj, kv, d))
    return inputs.output(outputs, module.o_proj)


class GroupedQueryAttention(OneCallAttention):
    """MHA, GQA and MQA, by ``num_key_value_heads``."""

    reference = staticmethod(gqa_reference)
    tp_plan = HEADS_SPLIT

    @classmethod
    def check(cls, config: Any) -> None:
        """G divides H."""
        check_divides(
            config, "num_key_value_heads", config.num_attention_heads, "num_attention_heads"
        )

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """H query heads, G key and value heads."""
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        return ProjectionHeads(heads, kv, kv, heads * config.head_dim)

    def combine(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Heads side by side through o_proj."""
        return self.o_proj(output.flatten(2))
