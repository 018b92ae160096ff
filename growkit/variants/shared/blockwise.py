# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention in tiles of queries and keys, for values of a width of their own.

torch's fused attention on the CPU takes values only as wide as keys. Wider ones (DIFF V1: 2d) fall
back to n x n maps in memory, or need two calls with halves of V, which compute every score and
every exponential twice. Here a tile of queries meets the keys up to its own end, tile by tile, with
a running maximum and sum of each row: scores once, one product with values of any width, and no
more than ``SCORES`` scores at a time, in memory that all tiles share. The backward pass computes
them again from the kept logarithms of the sums. Products of matrices do the work, so that a group
of query heads on one key head is one product and keys are never repeated.

Equal to the plain definition up to rounding. The algorithm is FlashAttention's (arXiv 2205.14135,
2307.08691), written in torch operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # queries of a tile: enough for an efficient product, few enough to waste no triangle
LONG = 4096  # tokens from which on twice the queries waste less than their products gain (forward)
SCORES = 1 << 19  # fp32 scores of a tile (2 MB), however many heads and sequences there are


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


class _Tiles:
    """The tiles of an attention, and the memory of their scores, which all tiles share.

    Attributes:
        blocks: of heads and of queries, for which ``keys`` gives the tiles.
    """

    def __init__(self, query: Tensor, rows: int, buffers: int) -> None:
        heads, group, n, _ = query.shape
        rows = min(n, rows)
        self._width = min(n, max(rows, SCORES // (group * rows)))
        together = min(heads, max(1, SCORES // (group * rows * self._width)))
        self.blocks = [
            (slice(head, min(head + together, heads)), slice(row, min(row + rows, n)))
            for head in range(0, heads, together)
            for row in range(0, n, rows)
        ]
        self._memory = query.new_empty(buffers, together * group * rows * self._width)
        # Added to scores: masked_fill_ on a part of them took 3 % of a pass of SAS.
        self._future = query.new_full((rows, rows), float("-inf")).triu_(1)

    def keys(self, rows: slice) -> Iterator[slice]:
        """Of the tiles of these queries: first their own keys, so that every row meets one."""
        for stop in range(rows.stop, 0, -self._width):
            yield slice(max(0, stop - self._width), stop)

    def product(self, left: Tensor, right: Tensor, buffer: int, factor: float = 1) -> Tensor:
        """left [heads, group x rows, d] times right [heads, seen, d], transposed, in a buffer."""
        shape = (*left.shape[:2], right.shape[1])
        memory = self._memory[buffer][: math.prod(shape)].view(shape)
        return memory.baddbmm_(left, right.transpose(1, 2), beta=0, alpha=factor)

    def scores(
        self, query: Tensor, key: Tensor, scaling: float, rows: slice, keys: slice
    ) -> Tensor:
        """query [heads, group x rows, d] times key [heads, seen, d], to the base 2 of exponentials;
        -inf for later tokens."""
        scores = self.product(query, key, 0, scaling * math.log2(math.e))
        if keys.stop == rows.stop:
            count = rows.stop - rows.start
            own = scores.unflatten(1, (-1, count))[..., -count:]
            own.add_(self._future[:count, :count])
        return scores


class _Blockwise(torch.autograd.Function):
    """query [heads, group, n, d], key [heads, n, d], value [heads, n, w] -> [.., group, n, w]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        logarithms = query.new_empty(*query.shape[:-1], 1)  # of the sums of a row, to the base 2
        heads_of_key, n = query.shape[1:3]  # rows of a product: those of all heads of a key
        tiles = _Tiles(query, 2 * ROWS if heads_of_key == 1 and n >= LONG else ROWS, buffers=1)
        for heads, rows in tiles.blocks:
            queries = query[heads, :, rows].flatten(1, 2)
            own, *earlier = tiles.keys(rows)
            scores = tiles.scores(queries, key[heads, own], scaling, rows, own)
            highest = scores.amax(-1, keepdim=True)
            maps = scores.sub_(highest).exp2_()
            total, part = maps.sum(-1, keepdim=True), maps @ value[heads, own]
            for keys in earlier:
                scores = tiles.scores(queries, key[heads, keys], scaling, rows, keys)
                before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
                shrinking = torch.exp2(before - highest)
                maps = scores.sub_(highest).exp2_()
                total.mul_(shrinking).add_(maps.sum(-1, keepdim=True))
                part.mul_(shrinking).baddbmm_(maps, value[heads, keys])
            output[heads, :, rows] = part.div_(total).unflatten(1, (query.shape[1], -1))
            logarithms[heads, :, rows] = (
                total.log2_().add_(highest).unflatten(1, (query.shape[1], -1))
            )
        ctx.save_for_backward(query, key, value, output, logarithms)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (query, key, value, output, logarithms), scaling = ctx.saved_tensors, ctx.scaling
        tiles = _Tiles(query, ROWS, buffers=2)
        inner = (gradient * output).sum(-1, keepdim=True)  # of a row's maps and their gradient
        of_query, of_key = query.new_zeros(query.shape), key.new_zeros(key.shape)
        of_value = value.new_zeros(value.shape)
        for heads, rows in tiles.blocks:
            queries, outer, logarithm, dot = (
                part[heads, :, rows].flatten(1, 2) for part in (query, gradient, logarithms, inner)
            )
            of_queries = torch.zeros_like(queries)
            for keys in tiles.keys(rows):
                maps = (
                    tiles.scores(queries, key[heads, keys], scaling, rows, keys)
                    .sub_(logarithm)
                    .exp2_()
                )
                of_value[heads, keys].baddbmm_(maps.transpose(1, 2), outer)
                of_scores = tiles.product(outer, value[heads, keys], 1).sub_(dot).mul_(maps)
                of_queries.baddbmm_(of_scores, key[heads, keys], alpha=scaling)
                of_key[heads, keys].baddbmm_(of_scores.transpose(1, 2), queries, alpha=scaling)
            of_query[heads, :, rows] = of_queries.unflatten(1, (query.shape[1], -1))
        return of_query, of_key, of_value, None
