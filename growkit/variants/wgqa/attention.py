# SPDX-License-Identifier: Apache-2.0
"""Weighted grouped-query attention: learned weights merge the heads of a group into one.

    K_g = sum over heads i of group g of w_k[i] (.) K_i,    V_g likewise with w_v,
    then ordinary grouped-query attention with K_g and V_g

All H = ``num_attention_heads`` key and value heads stay trainable; attention and cache see only the
G = ``num_key_value_heads`` merged ones. ``wgqa_weights`` says what a weight multiplies:

* "scalar": w [H], a whole head; "column": w [H, d], a channel of the head;
* "row": w [H, E], an input row of the head's matrix (a channel of the hidden state).

Every form is linear in the projection's weight, so the merged matrix is computed and used
(:meth:`WeightedGroupedQueryAttention.merged`): its G heads *are* the folded GQA model. For that to
be exact the weights apply before rotary encoding and before the optional head norm. A bias merges
with scalar and column weights; row weights say nothing about it and are refused with one.

* ``k_proj.weight``, ``v_proj.weight`` [H d, E], group g = heads g H/G ... (g + 1) H/G - 1;
* ``q_proj.weight`` [H d, E], ``o_proj.weight`` [E, H d]; ``w_k``, ``w_v`` as above.

``wgqa_init`` "mean" starts at G / H (mean pooling; the released code has 0.5, right only for
G = H / 2), "random" at N(0, 1) as the released code.

Parameters of a layer: 4 E d H + 2 W with W = H, H d or H E; KV cache: 2 G d elements a token.
Source: arXiv 2407.10855; Athe-kunal/Enhancement-in-GQA ``t5_WGQA_final.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..gqa.attention import GroupedQueryAttention
from ..shared.definition import Definition
from ..shared.linear_weights import LinearWeights
from ..shared.one_call import Positions, ProjectionHeads

WEIGHTS = ("scalar", "column", "row")
INITS = ("mean", "random")


def weight_shape(kind: str, heads: int, head_dim: int, hidden_size: int) -> tuple[int, ...]:
    """Shape of w_k and of w_v: [H], [H, d] or [H, E]."""
    return (heads, *{"scalar": (), "column": (head_dim,), "row": (hidden_size,)}[kind])


def start_weights(weights: Tensor, start: str, group: int) -> None:
    """Mean pooling of ``group`` heads, or the paper's random start; in place."""
    if start == "mean":
        init.constant_(weights, 1 / group)
    else:
        init.normal_(weights, mean=0.0, std=1.0)


def merged_projection(
    projection: LinearWeights, weights: Tensor, kind: str, group: int, head_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Weight [G d, E] and bias [G d] of the projection whose heads are the merged ones.

    Args:
        projection: of all H heads, weight [H d, E].
        weights: w_k or w_v, of :func:`weight_shape`.
        kind: what a weight multiplies, of ``WEIGHTS``.
        group: heads merged to one.
        head_dim: d.
    """
    heads = (-1, group, head_dim)
    by_head = projection.weight.unflatten(0, heads)  # [G, H/G, d, E]
    # One number an input row, or one a head, or d.
    factors = weights[:, None, :] if kind == "row" else weights.reshape(len(weights), -1, 1)
    factors = factors.unflatten(0, heads[:2])  # [G, H/G, 1 or d, 1 or E]
    weight = (by_head * factors).sum(1).flatten(0, 1)
    if projection.bias is None:
        return weight, None
    bias = (projection.bias.unflatten(0, heads) * factors.squeeze(-1)).sum(1).flatten()
    return weight, bias


def wgqa_reference(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    config, d = module.config, module.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

    def merged(projection: nn.Linear, weights: Tensor, norm: Any, first: int) -> Tensor:
        total = torch.zeros(*inputs.x.shape[:2], d, dtype=torch.float64)
        for i in range(first, first + group):
            rows, weight = slice(i * d, (i + 1) * d), weights[i].double()
            if config.wgqa_weights == "row":
                total = total + (inputs.x * weight) @ projection.weight.double()[rows].T
            else:
                total = total + weight * inputs.head(projection, i, d)
        return inputs.normed(total, norm)

    outputs = []
    for i in range(config.num_attention_heads):
        first = i // group * group
        query = inputs.head(module.q_proj, i, d, module.q_norm, rotary=True)
        key = inputs.rotated(merged(module.k_proj, module.w_k, module.k_norm, first))
        value = merged(module.v_proj, module.w_v, None, first)
        outputs.append(inputs.attention_map(query, key) @ value)
    return inputs.output(outputs, module.o_proj)


class WeightedGroupedQueryAttention(GroupedQueryAttention):
    """GQA on merged keys and values; the merge is done on the weights, once a call."""

    reference = staticmethod(wgqa_reference)
    fields: ClassVar[tuple[str, ...]] = ("wgqa_weights", "wgqa_init")
    tp_plan: ClassVar[dict[str, str]] = {}  # the merge reads whole groups of k_proj and v_proj
    key_value_class = LinearWeights
    k_proj: LinearWeights
    v_proj: LinearWeights

    @classmethod
    def defaults(cls, config: Any) -> dict[str, Any]:
        """One scalar a head, at the mean."""
        return super().defaults(config) | {"wgqa_weights": "scalar", "wgqa_init": "mean"}

    @classmethod
    def check(cls, config: Any) -> None:
        """Known kinds of weights, G divides H, no bias under row weights."""
        super().check(config)
        for field, valid in (("wgqa_weights", WEIGHTS), ("wgqa_init", INITS)):
            if getattr(config, field) not in valid:
                value = getattr(config, field)
                raise ValueError(f"{field} = {value!r}: it must be one of {valid}.")
        if config.attention_bias and config.wgqa_weights == "row":
            raise ValueError(
                "attention_bias = True with wgqa_weights = 'row': a weight of an input row cannot "
                "scale a bias; wgqa_weights that fit: 'scalar', 'column'."
            )

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """H heads of everything."""
        heads = config.num_attention_heads
        return ProjectionHeads(heads, heads, heads, heads * config.head_dim)

    @classmethod
    def weight_shape(cls, config: Any) -> tuple[int, ...]:
        """Shape of w_k and of w_v."""
        return weight_shape(
            config.wgqa_weights, config.num_attention_heads, config.head_dim, config.hidden_size
        )

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.w_k = nn.Parameter(torch.empty(self.weight_shape(config)))
        self.w_v = nn.Parameter(torch.empty(self.weight_shape(config)))
        self.init_weights()

    def init_weights(self) -> None:
        """Mean pooling, or the paper's random start."""
        for weights in (self.w_k, self.w_v):
            start_weights(weights, self.config.wgqa_init, self.num_key_value_groups)

    def merged(self, projection: LinearWeights, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight [G d, E] and bias [G d] of the k_proj or v_proj of the folded GQA model."""
        kind, group = self.config.wgqa_weights, self.num_key_value_groups
        return merged_projection(projection, weights, kind, group, self.head_dim)

    def project(
        self, hidden_states: Tensor, position_embeddings: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [b, H, n, d], rotated k and plain v [b, G, n, d] of merged heads."""
        query = self.split_heads(self.q_proj(hidden_states), self.q_norm)
        key, value = (
            functional.linear(hidden_states, *self.merged(projection, weights))
            for projection, weights in ((self.k_proj, self.w_k), (self.v_proj, self.w_v))
        )
        query, rotated = apply_rotary_pos_emb(
            query, self.split_heads(key, self.k_norm), *position_embeddings
        )
        return query, rotated, self.split_heads(value)
