# SPDX-License-Identifier: Apache-2.0
"""The steps that the readable definitions (the oracles) of all attention variants are written in.

Everything is float64, one head at a time, with explicit softmax matrices: slow and plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...families.lambda_schedule import LAMBDA_ROLES


class Definition:
    """The inputs of one attention layer in float64, and the steps on them.

    Args:
        hidden_states: [batch, n, hidden_size].
        position_embeddings: cos and sin, each [batch or 1, n, head_dim] (rotate-half pairs).
        attention_mask: additive [batch or 1, 1, n, n], or boolean with True where attention is
            allowed; None means causal.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> None:
        self.x = hidden_states.double()
        self.dtype = hidden_states.dtype
        self.cos, self.sin = (part.double() for part in position_embeddings)
        n = self.x.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(n, n, dtype=torch.bool, device=self.x.device).tril()
            attention_mask = attention_mask[None, None]
        if attention_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attention_mask, dtype=self.x.dtype)
            attention_mask = zeros.masked_fill(~attention_mask, float("-inf"))
        self.bias = attention_mask.double()[:, 0]

    def head(
        self,
        projection: Any,
        index: int,
        width: int,
        norm: Any = None,
        rotary: bool = False,
    ) -> Tensor:
        """Head ``index`` of a projection, rows index * width ...; [batch, n, width]."""
        rows = slice(index * width, (index + 1) * width)
        states = self.x @ projection.weight.double()[rows].T
        if projection.bias is not None:
            states = states + projection.bias.double()[rows]
        states = self.normed(states, norm)
        return self.rotated(states) if rotary else states

    def normed(self, states: Tensor, norm: Any) -> Tensor:
        """RMSNorm over the last dimension with the gain of ``norm``; None changes nothing."""
        if norm is None:
            return states
        mean_square = states.pow(2).mean(-1, keepdim=True)
        return states / torch.sqrt(mean_square + norm.variance_epsilon) * norm.weight.double()

    def rotated(self, states: Tensor) -> Tensor:
        """Rotary encoding of the pairs (i, i + d/2); [batch, n, d] -> the same."""
        first, second = states.chunk(2, dim=-1)
        return states * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def attention_map(self, query: Tensor, key: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(width) + mask); [batch, n, n]."""
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        return torch.softmax(scores + self.bias, dim=-1)

    def output(self, heads: list[Tensor], projection: Any) -> Tensor:
        """The heads' outputs side by side through o_proj; in the dtype of the input."""
        result = torch.cat(heads, dim=-1) @ projection.weight.double().T
        if projection.bias is not None:
            result = result + projection.bias.double()
        return result.to(self.dtype)


def lambda_of(module: Any) -> Tensor:
    """exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init, in float64 (DIFF Transformer)."""
    q1, k1, q2, k2 = (getattr(module, name).double() for name in LAMBDA_ROLES)
    return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + module.lambda_init
