# SPDX-License-Identifier: Apache-2.0
"""Grouped Differential Attention: the definition (the oracle) and the fast path beside it.

    A1_i = softmax(q_i k1^T / sqrt(d)),    A2_j = softmax(q_j k2^T / sqrt(d))
    o_i  = scale * norm(A1_i V - lambda * SUM_j A2_j V),    y = W_O concat_i o_i
    lambda = exp(lq1.lk1) - exp(lq2.lk2) + lambda_init

for signal head i, the noise heads j of its group, and V, k1, k2 of its key/value group. With a
sub-layer norm, ``norm`` is an RMSNorm over one head's output and scale = 1 - lambda_init; without,
both are absent. lambda is one fp32 scalar per layer.

Rows of q_proj are stripes: min(n_S, n_N) groups of (signal heads, then noise heads). Rows of k_proj
and v_proj with own noise keys are (n_kv, 2): k1, k2 adjacent and v1, v2 adjacent, the two values
read as one of width 2d. Columns of o_proj are the signal heads in order.

Sources: DIFF Transformer (arXiv 2410.05258, section 2.1), Grouped Differential Attention
(arXiv 2510.06949), layout of MotifTechnologies/vllm ``motif.py``. More noise than signal heads (the
sum over j) is our extension; the published operator is the case of one noise head per group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from ...families.lambda_schedule import LAMBDA_ROLES
from ..shared.blockwise import blockwise_attention, runs_in_blocks
from ..shared.definition import Definition, lambda_of
from ..shared.layer_keywords import take_cache, write_cache, written_by_attention
from ..shared.one_call import (
    HEADS_SPLIT,
    AttentionBase,
    OneCallAttention,
    Positions,
    ProjectionHeads,
    equal_widths_only,
)
from .heads import GdaHeads

# Backends known to take values wider than keys. Flash kernels want equal widths, and transformers
# pads V by (key width - value width) for them, which silently crops a wider V: every other backend
# gets two calls with the halves of V instead.
TWO_CALL_ENGINE = "growkit_vllm"  # growkit/modeling/served_by_vllm.py
WIDE_VALUE_BACKENDS = ("eager", "sdpa", "flex_attention", TWO_CALL_ENGINE)


def value_path(
    implementation: str, query: Tensor, key: Tensor, attention_mask: Tensor | None
) -> str:
    """How own-keys attention, whose values are 2d wide, calls its backend for one kind of head.

    * "blocks": growkit's own loop over tiles of scores (:mod:`.blockwise`). On the CPU, SDPA's
      fused kernel wants values as wide as keys; whole causal sequences in fp32 go, with one
      thread, through the loop, which computes the scores once: 0.5 to 0.8 of the time of "halves".
    * "halves": two calls, each with one half of the values. What is left on SDPA on the CPU
      (several threads, padding, steps of generation, bf16), and every backend not known to take
      wide values. The scores are computed twice, and memory does not grow with n^2.
    * "wide": one call with the values as they are. eager and flex_attention compute the scores once
      for a value of any width; on a GPU SDPA has fused kernels for unequal widths
      (memory-efficient for all, cuDNN where both are at most 128; not measured). On the CPU SDPA
      would fall back to explicit n x n maps, slower than the halves and 8 times their memory.

    Figures for head_dim 64 and 128 and 512 to 4096 tokens: benchmarks/README.md.

    Args:
        query, key: [b, heads, n, d] of one kind of head.
        attention_mask: as the attention function gets it.
    """
    if runs_in_blocks(implementation, query, key, 2 * key.shape[-1], attention_mask):
        return "blocks"
    if equal_widths_only(implementation, query.device.type):
        return "halves"
    return "wide" if implementation in WIDE_VALUE_BACKENDS else "halves"


def gda_attention_reference(
    module: GdaAttentionBase,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64 with explicit softmax matrices: the oracle.

    Args:
        module: holds the weights; called as ``module(hidden_states, ...)`` it is the fast path.
        hidden_states, position_embeddings, attention_mask: see :class:`Definition`.

    Returns:
        [batch, n, hidden_size] in the dtype of ``hidden_states``; differentiable.
    """
    heads, d = module.heads, module.heads.head_dim
    inputs = Definition(hidden_states, position_embeddings, attention_mask)

    def attention_map(query_head: int, key_head: int) -> Tensor:
        query = inputs.head(module.q_proj, query_head, d, module.q_norm, rotary=True)
        key = inputs.head(module.k_proj, key_head, d, module.k_norm, rotary=True)
        return inputs.attention_map(query, key)

    outputs = []
    stripe = heads.signal_per_group + heads.noise_per_group
    for i in range(heads.n_signal):
        group, place = divmod(i, heads.signal_per_group)
        first_noise = group * stripe + heads.signal_per_group
        kv = i * heads.n_kv // heads.n_signal
        if heads.noise_keys == "own":
            signal_key, noise_key = 2 * kv, 2 * kv + 1
            halves = [inputs.head(module.v_proj, 2 * kv + half, d) for half in (0, 1)]
            value = torch.cat(halves, dim=-1)
        else:
            signal_key = noise_key = kv
            value = inputs.head(module.v_proj, kv, d)
        signal_map = attention_map(group * stripe + place, signal_key)
        noise_map = torch.stack(
            [attention_map(first_noise + j, noise_key) for j in range(heads.noise_per_group)]
        ).sum(0)
        output = (signal_map - lambda_of(module) * noise_map) @ value
        if module.subln is not None:
            output = (1 - module.lambda_init) * inputs.normed(output, module.subln)
        outputs.append(output)
    return inputs.output(outputs, module.o_proj)


class GdaAttentionBase(AttentionBase):
    """Weights, lambda and the steps around the softmax attention that both forms share."""

    # A rank gets whole stripes and key/value groups if its count divides both numbers.
    tp_plan: ClassVar[dict[str, str]] = HEADS_SPLIT | {
        "subln": "replicated_with_grad_allreduce",
        # the lambda vectors: whole on every rank, each of which sees the gradient of its own heads
        "": "replicated_with_grad_allreduce",
    }

    @classmethod
    def heads_of(cls, config: Any) -> GdaHeads:
        """Head counts of a config."""
        heads: GdaHeads = config.heads
        return heads

    @classmethod
    def groups_of_ranks(cls, config: Any) -> int | None:
        """A group has whole stripes: its signal heads and the noise heads subtracted from them."""
        return cls.heads_of(config).n_kv if cls.tp_plan else None

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """All query heads, the keys and values as stored, the signal heads' outputs."""
        heads = cls.heads_of(config)
        stored = heads.keys_per_group * heads.n_kv
        output = heads.n_signal * heads.value_dim
        return ProjectionHeads(heads.n_signal + heads.n_noise, stored, stored, output)

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.heads = self.heads_of(config)
        self.lambda_init = float(config.lambda_init[layer_idx])
        for name in LAMBDA_ROLES:
            vector = torch.zeros(self.head_dim, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(vector))
        self.subln: LlamaRMSNorm | None = None
        if config.sub_layer_norm:
            self.subln = LlamaRMSNorm(self.heads.value_dim, eps=config.attn_rms_norm_eps)

    def init_weights(self) -> None:
        """lambda vectors N(0, lambda_std)."""
        for name in LAMBDA_ROLES:
            init.normal_(getattr(self, name), mean=0.0, std=self.config.lambda_std)

    def lambda_full(self) -> Tensor:
        """lambda of this layer: a 0-dim fp32 tensor, whatever the model's dtype."""
        q1, k1, q2, k2 = (getattr(self, name).float() for name in LAMBDA_ROLES)
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def difference(self, signal: Tensor, noise: Tensor) -> Tensor:
        """Difference, norm and output projection.

        ``signal`` is [b, n, groups, signal_per_group, v] and ``noise`` [b, n, groups,
        noise_per_group, v]; a group's summed noise is broadcast over its signal heads, so each
        noise map is computed once.
        """
        if self.heads.noise_per_group > 1:
            noise = noise.sum(-2, keepdim=True)
        # lambda is 0-dim: it multiplies in fp32 without promoting a bf16 output
        output = signal - self.lambda_full() * noise
        if self.subln is not None:
            output = self.subln(output) * (1 - self.lambda_init)
        return self.o_proj(output.flatten(2))


class GdaSharedKeyAttention(GdaAttentionBase, OneCallAttention):
    """Plain form: noise heads read the signal's keys, so all heads go through ONE attention call.

    The stripes are already in the order that grouped-query attention expects (n_kv divides the
    number of stripes).
    """

    def combine(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Outputs of all heads [b, n, heads, d] -> [b, n, hidden_size]."""
        stripe = [self.heads.signal_per_group, self.heads.noise_per_group]
        signal, noise = output.unflatten(2, (-1, sum(stripe))).split(stripe, dim=-2)
        return self.difference(signal, noise)


class _MapCall:
    """Stands for the module in one of two attention calls, which differ in heads per key head.

    ``part`` is 0 for the signal heads, 1 for the noise heads.
    """

    def __init__(self, module: nn.Module, num_key_value_groups: int, part: int) -> None:
        self.module, self.part = module, part
        self.num_key_value_groups = num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class GdaAttention(GdaAttentionBase):
    """DIFF V1 and Motif-2 form: noise heads have keys of their own, values are 2d wide.

    One attention call for the signal heads on k1 and one for the noise heads on k2; twice as many
    where values have to be halved (:func:`value_path`). k1, k2 and v1, v2 are
    cached as ordinary heads of width d, which every cache class of transformers can hold.
    """

    @classmethod
    def engine_obstacle(cls, config: Any) -> str | None:
        """The two calls."""
        return "signal and noise heads read keys of their own, in two attention calls a layer"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Positions,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[b, n, hidden_size] -> the same shape, and the softmax maps of all heads (eager only).

        The cache is among the keywords (:mod:`.layer_keywords`).
        """
        cache = take_cache(kwargs, self.config._attn_implementation)
        if written_by_attention(cache, kwargs):  # once a call, and there are two
            raise ValueError(
                "Continuous batching needs one attention call a layer; noise_keys = 'own' makes "
                "two. Use generate(), or a model with noise_keys = 'shared'."
            )
        query, key, value = self.project(hidden_states, position_embeddings)
        key, value = write_cache(cache, key, value, self.layer_idx, kwargs)
        stripe = [self.heads.signal_per_group, self.heads.noise_per_group]
        queries = query.unflatten(1, (-1, sum(stripe))).split(stripe, dim=2)
        path = value_path(self.config._attn_implementation, query, key, attention_mask)
        pairs = value.unflatten(1, (-1, 2))  # [b, n_kv, 2, n, d]
        if path == "halves":
            values = [pairs[:, :, 0], pairs[:, :, 1]]
        else:
            values = [pairs.transpose(2, 3).flatten(3)]
        outputs, maps = [], []
        for part, map_query in enumerate(queries):  # the signal heads on k1, the noise heads on k2
            output, weights = self._attend(
                path, map_query.flatten(1, 2), key[:, part::2], values, attention_mask, kwargs, part
            )
            outputs.append(output.unflatten(2, (-1, stripe[part])))
            if weights is not None:
                maps.append(weights.unflatten(1, (-1, stripe[part])))
        all_maps = torch.cat(maps, dim=2).flatten(1, 2) if maps else None
        return self.difference(*outputs), all_maps

    def _attend(
        self,
        path: str,
        query: Tensor,
        key: Tensor,
        values: list[Tensor],
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
        part: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention of one kind of head: [b, n, heads, width of the values together]."""
        attention: Callable = blockwise_attention
        if path != "blocks":
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        call = _MapCall(self, query.shape[1] // key.shape[1], part)
        results = [
            attention(
                call, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
            )
            for value in values
        ]
        outputs = [output for output, _ in results]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1), results[0][1]
