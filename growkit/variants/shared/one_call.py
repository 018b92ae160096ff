# SPDX-License-Identifier: Apache-2.0
"""What all attention variants share: projections, head norms, rotary encoding, ONE attention call.

A variant is a class that says how many heads its projections have (``projection_heads``), and what
happens to the heads' outputs (``combine``); where its queries, keys or values are made in another
way it overrides ``project``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .blockwise import blockwise_attention, runs_in_blocks
from .layer_keywords import take_cache, write_cache
from .linear_weights import LinearWeights

Positions = tuple[Tensor, Tensor]

# Tensor-parallel plan of heads that stay whole on a rank; names are under layers.*.self_attn.
HEADS_SPLIT = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "o_proj": "rowwise",
    # whole on every rank, each of which sees the gradient of its own heads
    "q_norm": "replicated_with_grad_allreduce",
    "k_norm": "replicated_with_grad_allreduce",
}


def check_divides(config: Any, field: str, number: int, of: str) -> None:
    """Raise ValueError unless the config field divides ``number``, which ``of`` describes."""
    count = getattr(config, field)
    if count < 1 or number % count:
        fitting = [n for n in range(1, number + 1) if number % n == 0]
        raise ValueError(
            f"{field} = {count} has to divide {number} ({of}). {field} that fit: {fitting}."
        )


def equal_widths_only(implementation: str, device: str) -> bool:
    """Whether the fused attention of a backend takes values only as wide as keys.

    True of SDPA on the CPU: other widths fall back to explicit n x n maps.
    """
    return implementation == "sdpa" and device == "cpu"


class ProjectionHeads(NamedTuple):
    """Sizes of the four projections.

    Attributes:
        query: heads of q_proj, ``head_dim`` rows each.
        key: heads of k_proj.
        value: heads of v_proj.
        output: columns of o_proj.
    """

    query: int
    key: int
    value: int
    output: int


class AttentionBase(nn.Module):
    """The projections and the facts that the config and the model ask a variant for.

    Tensors, with E ``hidden_size`` and d ``head_dim``; head i of a projection is its rows
    i d ... (i + 1) d:

    * ``q_proj.weight`` [query heads x d, E], ``k_proj.weight``, ``v_proj.weight`` alike,
      ``o_proj.weight`` [E, output];
    * with ``attention_bias`` (Qwen2): a bias on q, k and v; with ``attention_output_bias`` on o;
    * with ``qk_norm`` (Qwen3): ``q_norm.weight`` and ``k_norm.weight`` [d], an RMSNorm (epsilon
      ``qk_norm_eps``) of every query and key head by itself, before the rotation.
    """

    is_causal = True
    # Config fields that only some variants have, and this one reads.
    fields: ClassVar[tuple[str, ...]] = ()
    # Tensor-parallel plan of the layer's modules; empty: every rank computes all heads.
    tp_plan: ClassVar[Mapping[str, str]] = {}
    # Class of k_proj and v_proj; LinearWeights where their matrices are read.
    key_value_class: ClassVar[type[nn.Linear | LinearWeights]] = nn.Linear
    # The readable definition: (module, hidden_states, position_embeddings, attention_mask).
    reference: ClassVar[Callable[..., Tensor]]

    # -- facts, from a config -------------------------------------------------------------------

    @classmethod
    def for_config(cls, config: Any) -> type[AttentionBase]:
        """The class that implements a config of this variant (some variants have two forms)."""
        return cls

    @classmethod
    def defaults(cls, config: Any) -> dict[str, Any]:
        """Values of the config fields that were not given."""
        return {"num_key_value_heads": config.num_attention_heads}

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError, naming the fields and what fits, for a config that makes no layer."""

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """Sizes of the projections."""
        raise NotImplementedError

    @classmethod
    def engine_obstacle(cls, config: Any) -> str | None:
        """Why an engine that puts one attention layer of its own in the place of the attention
        call, sized by the config's heads, cannot run the variant; None: it can.
        """
        return None

    @classmethod
    def groups_of_ranks(cls, config: Any) -> int | None:
        """Key/value groups, each of which stays whole on a tensor-parallel rank, with all of its
        query heads; None: the layer is not split."""
        return cls.projection_heads(config).key if cls.tp_plan else None

    # -- the layer ------------------------------------------------------------------------------

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim: int = config.head_dim
        self.scaling = self.head_dim**-0.5
        heads = self.projection_heads(config)
        self.num_key_value_groups = heads.query // heads.key  # read by the attention functions
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, heads.query * self.head_dim, bias=bias)
        self.k_proj = self.key_value_class(hidden, heads.key * self.head_dim, bias=bias)
        self.v_proj = self.key_value_class(hidden, heads.value * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads.output, hidden, bias=config.attention_output_bias)
        self.q_norm: LlamaRMSNorm | None = None
        self.k_norm: LlamaRMSNorm | None = None
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.qk_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.qk_norm_eps)

    def init_weights(self) -> None:
        """Start values of what a model of linear layers does not know (from scratch only)."""

    def split_heads(self, states: Tensor, norm: nn.Module | None = None) -> Tensor:
        """[b, n, heads x d] -> [b, heads, n, d], each head normed by itself."""
        # -1: a tensor-parallel rank's share of the heads
        heads = states.view(*states.shape[:-1], -1, self.head_dim)
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    def project(
        self, hidden_states: Tensor, position_embeddings: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [b, heads, n, d], rotated k and plain v [b, kv heads, n, d]."""
        query = self.split_heads(self.q_proj(hidden_states), self.q_norm)
        key = self.split_heads(self.k_proj(hidden_states), self.k_norm)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, self.split_heads(self.v_proj(hidden_states))


class OneCallAttention(AttentionBase):
    """A variant whose heads all go through one call of the attention function.

    Serving engines that replace the attention function parse this ``forward`` and want exactly
    one call of it, taken from ``ALL_ATTENTION_FUNCTIONS`` by that name.
    """

    def attended_values(self, value: Tensor) -> Tensor:
        """Cached values [b, kv heads, n, d] as the attention call gets them."""
        return value

    def combine(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Outputs of all query heads [b, n, heads, d] -> [b, n, hidden_size]."""
        raise NotImplementedError

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
        implementation = self.config._attn_implementation
        cache = take_cache(kwargs, implementation)
        query, key, value = self.project(hidden_states, position_embeddings)
        key, value = write_cache(cache, key, value, self.layer_idx, kwargs)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention_forward
        )
        if runs_in_blocks(implementation, query, key, value.shape[-1], attention_mask):
            attention_interface = blockwise_attention
        else:
            value = self.attended_values(value)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # an engine may return the heads side by side
        output = output.reshape(*hidden_states.shape[:-1], -1, value.shape[-1])
        return self.combine(output, hidden_states), weights
