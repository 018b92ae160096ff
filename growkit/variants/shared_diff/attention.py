# SPDX-License-Identifier: Apache-2.0
"""Shared DIFF Transformer: the two maps of a head share a base projection and differ by low rank.

    q1_i = (W_Q,i + U_i1 D_i1) x,   q2_i = (W_Q,i + U_i2 D_i2) x,    k1, k2 likewise with W_K
    o_i  = (1 - lambda_init) * RMSNorm((A1 - lambda A2) v),    A = softmax(q k^T / sqrt(d))
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init           one fp32 scalar a layer

**The paper's text was not at hand** (only its abstract: "a shared base matrix to model global
patterns", "low-rank updates"). Our reading: the updates are per head, D [r, E] and U [d, r], with
one rank for queries (``query_rank``) and one for keys (``key_rank``); values, lambda, norm and
(1 - lambda_init) are those of DIFF V1. Without ``sub_layer_norm`` norm and scale are absent.

``num_attention_heads`` H = 2h counts maps, ``num_key_value_heads`` G cached heads. Two forms:

* ``key_rank`` > 0, the form of DIFF V1: G / 2 pairs of keys, values 2d wide, two attention calls.
  q_proj [h d, E], k_proj [G d / 2, E], v_proj [G d, E] (kv head, 2d), o_proj [E, 2h d];
* ``key_rank`` = 0, updates on Q alone, the form of DIFF V2: both maps of a head read the same key
  and a value of width d, so the cache is that of plain GQA, and there is one attention call.
  q_proj [h d, E], k_proj and v_proj [G d, E], o_proj [E, h d].

Updates: ``q_down.weight`` [2h r, E], rows (head, map, r), ``q_up.weight`` [2h d, r], rows (head,
map, d); ``k_down``, ``k_up`` alike over the key pairs. ``lambda_q1/k1/q2/k2`` [d] fp32;
``subln.weight`` [width of a value]. Biases and head norms act on base + update and on each map.

Parameters of a layer, with p = G / 2 and v = 2d, or (``key_rank`` = 0) p = G and v = d:
E d h + E d p + E p v + E h v + 2h r_q (E + d) + 2p r_k (E + d) + 4d (+ v with the norm);
KV cache: 2 G d elements a token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ...families.lambda_schedule import lambda_init_schedule
from ..diff_v1.attention import DiffV1Attention
from ..gda.attention import GdaAttention, GdaAttentionBase, GdaSharedKeyAttention
from ..gda.heads import GdaHeads
from ..shared.definition import Definition, lambda_of
from ..shared.linear_weights import LinearWeights
from ..shared.one_call import AttentionBase, Positions, ProjectionHeads, check_divides


def shared_diff_reference(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    config, d = module.config, module.head_dim
    heads = config.num_attention_heads // 2
    kv_heads = config.num_key_value_heads // (2 if config.key_rank else 1)

    def updated(kind: str, head: int, which: int, norm: Any, rank: int) -> Tensor:
        states = inputs.head(getattr(module, f"{kind}_proj"), head, d)
        if rank:
            at = 2 * head + which
            down = getattr(module, f"{kind}_down").weight.double()[at * rank : (at + 1) * rank]
            up = getattr(module, f"{kind}_up").weight.double()[at * d : (at + 1) * d]
            states = states + (inputs.x @ down.T) @ up.T
        return inputs.rotated(inputs.normed(states, norm))

    outputs = []
    for i in range(heads):
        kv = i * kv_heads // heads
        first, second = (
            inputs.attention_map(
                updated("q", i, which, module.q_norm, config.query_rank),
                updated("k", kv, which, module.k_norm, config.key_rank),
            )
            for which in (0, 1)
        )
        value = inputs.head(module.v_proj, kv, 2 * d if config.key_rank else d)
        output = (first - lambda_of(module) * second) @ value
        if module.subln is not None:
            output = (1 - module.lambda_init) * inputs.normed(output, module.subln)
        outputs.append(output)
    return inputs.output(outputs, module.o_proj)


class SharedDiffAttention(GdaAttentionBase):
    """Facts and projections of both forms; :meth:`for_config` names the form."""

    reference = staticmethod(shared_diff_reference)
    tp_plan: ClassVar[dict[str, str]] = {}  # the updates of a head are read as one block
    fields: ClassVar[tuple[str, ...]] = (
        "sub_layer_norm",
        "lambda_init",
        "query_rank",
        "key_rank",
    )

    @classmethod
    def for_config(cls, config: Any) -> type[AttentionBase]:
        """Two calls with updated keys, else one."""
        return SharedDiffTwoKeys if config.key_rank else SharedDiffOneKey

    @classmethod
    def defaults(cls, config: Any) -> dict[str, Any]:
        """DIFF V1's; the ranks have no default."""
        heads = config.num_attention_heads // (1 if config.key_rank else 2)
        return {
            "num_key_value_heads": heads,
            "sub_layer_norm": True,
            "lambda_init": lambda_init_schedule(config.num_hidden_layers),
        }

    @classmethod
    def check(cls, config: Any) -> None:
        """Ranks are given; the counts are DIFF V1's, or DIFF V2's without updates of the keys."""
        for field, least in (("query_rank", 1), ("key_rank", 0)):
            rank = getattr(config, field)
            if rank is None or not least <= rank <= config.head_dim:
                raise ValueError(
                    f"{field} = {rank} with attention = 'shared_diff': the rank of the updates has "
                    f"to lie between {least} and head_dim = {config.head_dim}"
                    + (" (0: no updates of the keys, cache as plain GQA)." if not least else ".")
                )
        if config.key_rank:
            DiffV1Attention.check(config)
            return
        if config.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads = {config.num_attention_heads} with attention = "
                "'shared_diff': every head is a pair of maps, so it has to be even."
            )
        half = config.num_attention_heads // 2
        check_divides(config, "num_key_value_heads", half, "half of num_attention_heads")

    @classmethod
    def heads_of(cls, config: Any) -> GdaHeads:
        """As many second as first maps; a key of their own, or the first map's."""
        half, kv = config.num_attention_heads // 2, config.num_key_value_heads
        if config.key_rank:
            return GdaHeads(half, half, kv // 2, config.head_dim, "own")
        return GdaHeads(half, half, kv, config.head_dim, "shared")

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """The shared bases, the values as stored."""
        heads = cls.heads_of(config)
        output = heads.n_signal * heads.value_dim
        return ProjectionHeads(heads.n_signal, heads.n_kv, config.num_key_value_heads, output)

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        hidden, d = config.hidden_size, self.head_dim
        for kind, heads, rank in (
            ("q", self.heads.n_signal, config.query_rank),
            ("k", self.heads.n_kv, config.key_rank),
        ):
            if rank:
                self.add_module(f"{kind}_down", nn.Linear(hidden, 2 * heads * rank, bias=False))
                # one block a head and map: read, since no call multiplies block by block
                self.add_module(f"{kind}_up", LinearWeights(rank, 2 * heads * d))

    def updated(self, kind: str, hidden_states: Tensor, rank: int) -> Tensor:
        """Base plus update of both maps: [b, n, 2 x heads x d], the maps of a head adjacent."""
        base = getattr(self, f"{kind}_proj")(hidden_states).unflatten(-1, (-1, 1, self.head_dim))
        low = getattr(self, f"{kind}_down")(hidden_states).unflatten(-1, (-1, 2, rank))
        up = getattr(self, f"{kind}_up").weight.unflatten(0, (-1, 2, self.head_dim))
        return (base + torch.einsum("bnhmr,hmdr->bnhmd", low, up)).flatten(2)

    def project(
        self, hidden_states: Tensor, position_embeddings: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [b, 2h, n, d], rotated k and plain v [b, G, n, d]; pairs adjacent."""
        rank = self.config.key_rank
        query = self.updated("q", hidden_states, self.config.query_rank)
        key = self.updated("k", hidden_states, rank) if rank else self.k_proj(hidden_states)
        rotated = apply_rotary_pos_emb(
            self.split_heads(query, self.q_norm),
            self.split_heads(key, self.k_norm),
            *position_embeddings,
        )
        return *rotated, self.split_heads(self.v_proj(hidden_states))


class SharedDiffTwoKeys(SharedDiffAttention, GdaAttention):
    """Updates on Q and K: DIFF V1's two calls."""


class SharedDiffOneKey(SharedDiffAttention, GdaSharedKeyAttention):
    """Updates on Q alone: one call."""
