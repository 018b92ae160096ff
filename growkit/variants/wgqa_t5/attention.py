# SPDX-License-Identifier: Apache-2.0
"""Grouped and weighted grouped-query attention in T5's decoder: self- and cross-attention.

    o_i = softmax(q_i k_g^T + B_i) v_g,   g = floor(i G / H),      y = W_O concat_i o_i

for the H ``num_heads`` query heads and G ``decoder_num_key_value_heads``. T5 does not scale scores.
B_i is the relative position bias of *query* head i (self-attention; block 0 learns it and hands it
on; zero in cross-attention), so sharing keys leaves it alone. Keys and values are of the decoder's
own tokens, or of the encoder's last hidden state.

* "gqa": ``k.weight``, ``v.weight`` [G d, E];
* "wgqa": ``k.weight``, ``v.weight`` [H d, E] and ``w_k``, ``w_v`` [H], [H, d] or [H, E]:
  K_g = sum over heads i of group g of w_k[i] (.) K_i, V_g likewise. T5 has no rotary encoding, head
  norm or bias in between, so every form of the weights folds into a "gqa" layer exactly;
* ``q.weight`` [H d, E], ``o.weight`` [E, H d], E = ``d_model``, d = ``d_kv``;
* ``relative_attention_bias.weight`` [buckets, H] in the self-attention of block 0.

Parameters of a layer: E d (2 H + 2 G) ("gqa"), 4 E d H + 2 W ("wgqa", W = H, H d or H E), without
the position bias. KV cache of a block: 2 G d elements a target token (self) and 2 G d a source
token (cross, written once).

Source: arXiv 2407.10855 (T5's decoder; Athe-kunal/Enhancement-in-GQA ``t5_WGQA_final.py``);
transformers ``models/t5`` (5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.models.t5.modeling_t5 import T5Attention

from ..shared.layer_keywords import take_cache
from ..shared.linear_weights import LinearWeights
from ..wgqa.attention import merged_projection, start_weights, weight_shape


def position_bucket(distance: int, buckets: int, farthest: int) -> int:
    """Bucket of a key ``distance`` tokens back: exact up to half of them, then logarithmic."""
    exact = buckets // 2
    if distance < exact:
        return max(distance, 0)
    further = log(max(distance, 1) / exact) / log(farthest / exact) * (buckets - exact)
    return min(exact + int(further), buckets - 1)


def t5_reference(
    module: GroupedT5Attention,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64.

    Args:
        module: the layer.
        hidden_states: [b, n, E].
        key_value_states: [b, m, E], the encoder's; None: self-attention, which is causal.
        mask: boolean [b, m], True at tokens that may be attended to.
    """
    x = hidden_states.double()
    source = x if key_value_states is None else key_value_states.double()
    (n, m), d, config = (x.shape[1], source.shape[1]), module.key_value_proj_dim, module.config
    group = config.num_heads // config.decoder_num_key_value_heads

    def head(projection: Any, i: int, states: Tensor, scale: Tensor | None = None) -> Tensor:
        return (states if scale is None else states * scale) @ projection.weight.double()[
            i * d : (i + 1) * d
        ].T

    def shared(projection: Any, weights: Tensor | None, g: int) -> Tensor:
        if weights is None:
            return head(projection, g, source)
        total = torch.zeros(*source.shape[:2], d, dtype=torch.float64)
        for i in range(g * group, (g + 1) * group):
            w = weights[i].double()
            if config.wgqa_weights == "row":
                total = total + head(projection, i, source, w)
            else:
                total = total + w * head(projection, i, source)
        return total

    allowed = torch.ones(n, m, dtype=torch.bool)[None]
    if key_value_states is None:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, :]
    outputs = []
    for i in range(config.num_heads):
        scores = head(module.q, i, x) @ shared(module.k, module.w_k, i // group).transpose(1, 2)
        if module.has_relative_attention_bias:
            limits = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
            index = [[position_bucket(a - b, *limits) for b in range(m)] for a in range(n)]
            scores = scores + module.relative_attention_bias.weight.double()[torch.tensor(index), i]
        scores = scores.masked_fill(~allowed, float("-inf"))
        outputs.append(scores.softmax(-1) @ shared(module.v, module.w_v, i // group))
    return (torch.cat(outputs, -1) @ module.o.weight.double().T).to(hidden_states.dtype)


def grouped_eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """T5's eager attention for heads that share keys: [b, n, H, d] and the maps [b, H, n, m]."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias
    maps = functional.dropout(scores.softmax(-1), p=dropout, training=module.training)
    return (maps @ value).transpose(1, 2).contiguous(), maps


class GroupedT5Attention(T5Attention):
    """T5's attention with G key/value heads; by ``decoder_attention`` plain or merged ones."""

    reference = staticmethod(t5_reference)
    k: nn.Linear | LinearWeights
    v: nn.Linear | LinearWeights

    def __init__(
        self, config: Any, has_relative_attention_bias: bool, layer_idx: int, is_causal: bool
    ) -> None:
        super().__init__(config, has_relative_attention_bias, layer_idx, is_causal)
        heads, kv = config.num_heads, config.decoder_num_key_value_heads
        self.num_key_value_groups = heads // kv  # read by the attention functions
        self.w_k: nn.Parameter | None = None
        self.w_v: nn.Parameter | None = None
        if config.decoder_attention == "gqa":
            self.k = nn.Linear(self.d_model, kv * self.key_value_proj_dim, bias=False)
            self.v = nn.Linear(self.d_model, kv * self.key_value_proj_dim, bias=False)
        else:
            shape = weight_shape(config.wgqa_weights, heads, config.d_kv, config.d_model)
            self.w_k = nn.Parameter(torch.empty(shape))
            self.w_v = nn.Parameter(torch.empty(shape))
            self.k = LinearWeights(self.d_model, heads * self.key_value_proj_dim)
            self.v = LinearWeights(self.d_model, heads * self.key_value_proj_dim)
            self.init_merge()

    def init_merge(self) -> None:
        """Start values of w_k and w_v, where there are such."""
        for weights in (self.w_k, self.w_v):
            if weights is not None:
                start_weights(weights, self.config.wgqa_init, self.num_key_value_groups)

    def merged(self, projection: LinearWeights, weights: Tensor) -> Tensor:
        """Weight [G d, E] of the k or v of the folded layer."""
        kind, group = self.config.wgqa_weights, self.num_key_value_groups
        return merged_projection(projection, weights, kind, group, self.key_value_proj_dim)[0]

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[b, m, E] -> k and v, each [b, G, m, d]."""
        shape = (*states.shape[:-1], -1, self.key_value_proj_dim)
        key, value = (
            self.shared_heads(states, projection, weights).view(shape).transpose(1, 2)
            for projection, weights in ((self.k, self.w_k), (self.v, self.w_v))
        )
        return key, value

    def shared_heads(self, states: Tensor, projection: Any, weights: Tensor | None) -> Tensor:
        """[b, m, E] -> [b, m, G d]: stored heads, or merged ones."""
        if weights is None:
            return projection(states)
        return functional.linear(states, self.merged(projection, weights))

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Arguments and results of T5Attention: output [b, n, E], position bias [1, H, n, m], maps.

        The keys of the source are merged and cached once; later steps read them from the cache,
        which is among the keywords (:mod:`.layer_keywords`).
        """
        shape, cross = hidden_states.shape[:-1], key_value_states is not None
        states = hidden_states if key_value_states is None else key_value_states
        query = self.q(hidden_states).view(*shape, -1, self.key_value_proj_dim).transpose(1, 2)
        seen: Any = 0
        all_caches = take_cache(kwargs, self.config._attn_implementation)
        cache = all_caches
        if all_caches is not None:
            seen = all_caches.get_seq_length(self.layer_idx)
            if isinstance(seen, Tensor):  # a static cache counts in place
                seen = seen.clone()
        both = isinstance(all_caches, EncoderDecoderCache)
        if both:
            cache = (all_caches.self_attention_cache, all_caches.cross_attention_cache)[cross]
        if cross and both and all_caches.is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key, value = self.keys_and_values(states)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if cross and both:
                    all_caches.is_updated[self.layer_idx] = True
        if position_bias is None:
            position_bias = self._position_bias(query, key.shape[-2], seen)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, grouped_eager_attention
        )
        output, maps = attention_interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self.o(output.reshape(*shape, -1).contiguous()), position_bias, maps

    def _position_bias(self, query: Tensor, keys: int, seen: Any) -> Tensor:
        """[1, H, n, keys]: learned in block 0, zero in cross-attention."""
        n = query.shape[-2]
        if self.has_relative_attention_bias:
            return self.compute_bias(n, keys, device=query.device, past_seen_tokens=seen)
        zeros = query.new_zeros(1, self.n_heads, n, keys)
        if self.gradient_checkpointing and self.training:
            zeros.requires_grad = True
        return zeros
