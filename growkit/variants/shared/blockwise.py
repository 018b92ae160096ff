# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention in blocks of queries, for values of another width than the keys'.

torch's fused attention on the CPU takes values only as wide as keys. Wider ones (DIFF V1: 2d) fall
back to n x n maps in memory, or need two calls with halves of V, which compute every score and
every exponential twice. Here a block of queries meets the keys up to its own end: scores once, one
product with values of any width, and no more than ``SCORES`` scores in memory. The backward pass
computes a block's scores again, as fused kernels do. Products of matrices do the work, so that a
group of query heads on one key head is one product and keys are never repeated.

Equal to the plain definition up to rounding: a row of scores is whole when its softmax is taken.
The idea (rows in blocks, scores recomputed in the backward pass) is that of arXiv 2112.05682.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # queries of a block: enough for an efficient product, few enough to waste no triangle
SCORES = 1 << 22  # fp32 scores held at once (16 MB), however many heads and sequences there are


def runs_in_blocks(
    implementation: str, query: Tensor, key: Tensor, width: int, attention_mask: Tensor | None
) -> bool:
    """Whether :func:`blockwise_attention` stands in for SDPA, where SDPA has no fused kernel.

    On the CPU, for values whose ``width`` is not the keys', in fp32 (scores of bf16 would be
    rounded to bf16), for whole causal sequences without padding that are long enough to gain by it,
    and outside of a compiler, which would unroll the blocks. With one thread: SDPA's kernel shares
    its work out better than the products of a block (forward and backward of 2048 tokens, two
    calls with halves against blocks: 551 and 423 ms with one thread, 319 and 371 ms with two).
    """
    return (
        implementation == "sdpa"
        and query.device.type == "cpu"
        and key.shape[-1] != width
        and attention_mask is None
        and query.shape[2] == key.shape[2] >= 2 * ROWS
        and query.dtype == key.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.get_num_threads() == 1
        and not torch.compiler.is_compiling()
    )


def blockwise_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' form: causal, without dropout, maps not returned.

    Args:
        query: [b, heads, n, d].
        key: [b, kv heads, n, d]; consecutive query heads share one.
        value: [b, kv heads, n, w] with any width w.
        attention_mask: None (see :func:`runs_in_blocks`).
        scaling: of the scores.

    Returns:
        [b, n, heads, w].
    """
    batch, kv_heads = key.shape[:2]
    groups = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)
    output = _Blockwise.apply(groups, key.flatten(0, 1), value.flatten(0, 1), scaling)
    return output.unflatten(0, (batch, kv_heads)).flatten(1, 2).transpose(1, 2), None


def _blocks(query: Tensor) -> list[tuple[slice, slice]]:
    """Which key heads and which queries a step takes; heads as many as ``SCORES`` has room for."""
    heads, group, n, _ = query.shape
    together = max(1, SCORES // (group * ROWS * n))
    return [
        (slice(head, head + together), slice(row, min(row + ROWS, n)))
        for head in range(0, heads, together)
        for row in range(0, n, ROWS)
    ]


def _maps(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """softmax of a block: query [heads, group, rows, d], key [heads, seen, d], the rows' own keys
    last -> [heads, group x rows, seen]."""
    rows = query.shape[2]
    scores = torch.bmm((query * scaling).flatten(1, 2), key.transpose(1, 2))
    own = scores.unflatten(1, (-1, rows))[..., -rows:]
    own.masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu_(1), float("-inf"))
    return torch.softmax(scores, dim=-1)


class _Blockwise(torch.autograd.Function):
    """query [heads, group, n, d], key [heads, n, d], value [heads, n, w] -> [.., group, n, w]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        for heads, rows in _blocks(query):
            maps = _maps(query[heads, :, rows], key[heads, : rows.stop], scaling)
            part = torch.bmm(maps, value[heads, : rows.stop])
            output[heads, :, rows] = part.unflatten(1, (query.shape[1], -1))
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (query, key, value), scaling = ctx.saved_tensors, ctx.scaling
        of_query = query.new_empty(query.shape)
        of_key, of_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        for heads, rows in _blocks(query):
            queries, keys = query[heads, :, rows], key[heads, : rows.stop]
            maps = _maps(queries, keys, scaling)
            outer = gradient[heads, :, rows].flatten(1, 2)
            of_value[heads, : rows.stop].baddbmm_(maps.transpose(1, 2), outer)
            of_maps = torch.bmm(outer, value[heads, : rows.stop].transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_maps, maps, -1, maps.dtype)
            of_query[heads, :, rows] = torch.bmm(of_scores, keys).mul_(scaling).view(queries.shape)
            of_key[heads, : rows.stop].baddbmm_(
                of_scores.transpose(1, 2), queries.flatten(1, 2), alpha=scaling
            )
        return of_query, of_key, of_value, None
