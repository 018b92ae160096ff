# SPDX-License-Identifier: Apache-2.0
"""DIFF V2: one ordinary attention call on 2h query heads, then pairwise differences.

    a   = attention(q [2h heads], k [G heads], v [G heads])
    o_i = a_2i - sigmoid(lambda_i(x)) * a_{2i+1},    y = W_O concat_i o_i,    lambda(x) = W_lambda x

No norm, no (1 - lambda_init), no exponential. ``num_attention_heads`` is 2h. Both heads of a pair
stand in one key/value group (2h / G is even): pairing by halves is unstable (blog).

* ``q_proj.weight`` [2h d, E]: rows (output head, map): the pair is **adjacent**;
* ``k_proj.weight``, ``v_proj.weight`` [G d, E]; ``o_proj.weight`` [E, h d];
* ``lambda_proj.weight`` [h, E], no bias.

Rotary pairs are rotate-half; Microsoft's code rotates (2i, 2i + 1). It is token-gated GDA at one
signal head a noise head, whose fast path it is.

Parameters of a layer: E d (3h + 2G) + E h; KV cache: 2 G d elements a token.
Source: huggingface.co/blog/microsoft/diff-attn-v2; unilm ``multihead_flashdiffv2.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..gda_gated.attention import GdaGatedAttention
from ..shared.definition import Definition
from ..shared.one_call import Positions


def diff_v2_reference(
    module: GdaGatedAttention,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    config, d = module.config, module.head_dim
    attended = []
    for i in range(config.num_attention_heads):  # ordinary grouped-query attention
        kv = i * config.num_key_value_heads // config.num_attention_heads
        query = inputs.head(module.q_proj, i, d, module.q_norm, rotary=True)
        key = inputs.head(module.k_proj, kv, d, module.k_norm, rotary=True)
        attended.append(inputs.attention_map(query, key) @ inputs.head(module.v_proj, kv, d))
    weights = torch.sigmoid(inputs.x @ module.lambda_proj.weight.double().T)
    outputs = [
        attended[2 * i] - weights[..., i : i + 1] * attended[2 * i + 1]
        for i in range(config.num_attention_heads // 2)
    ]
    return inputs.output(outputs, module.o_proj)


class DiffV2Attention(GdaGatedAttention):
    """DIFF V2 on the fast path of token-gated GDA."""

    reference = staticmethod(diff_v2_reference)
    fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def noise_heads(cls, config: Any) -> int:
        """Half of the query heads are subtracted."""
        half: int = config.num_attention_heads // 2
        return half

    @classmethod
    def check(cls, config: Any) -> None:
        """Query heads come in pairs; a pair stands in one key/value group."""
        if config.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads = {config.num_attention_heads} with attention = 'diff_v2': "
                "it counts both heads of every pair and has to be even."
            )
        super().check(config)
