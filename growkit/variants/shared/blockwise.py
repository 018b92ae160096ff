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
SCORES = 1 << 20  # fp32 scores of a step (4 MB), however many heads and sequences there are


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


class _Steps:
    """Which heads and which queries a step takes, and the memory that its maps stand in.

    Heads as many as ``SCORES`` has room for. All steps share their memory: maps of new memory in
    every step cost a fifth more time (Xeon, 16 heads of 96, 2048 and 4096 tokens).
    """

    def __init__(self, query: Tensor, buffers: int) -> None:
        heads, self.group, n, _ = query.shape
        together = min(heads, max(1, SCORES // (self.group * ROWS * n)))
        self.blocks = [
            (slice(head, min(head + together, heads)), slice(row, min(row + ROWS, n)))
            for head in range(0, heads, together)
            for row in range(0, n, ROWS)
        ]
        self._memory = query.new_empty(buffers, together * self.group * min(ROWS, n) * n)
        self._future = torch.ones(ROWS, ROWS, dtype=torch.bool, device=query.device).triu_(1)

    def buffers(self, heads: slice, rows: slice) -> list[Tensor]:
        """[heads, group x rows, seen] each, not initialised."""
        shape = (heads.stop - heads.start, self.group * (rows.stop - rows.start), rows.stop)
        size = shape[0] * shape[1] * shape[2]
        return [memory[:size].view(shape) for memory in self._memory]

    def maps(self, query: Tensor, key: Tensor, scores: Tensor, out: Tensor) -> Tensor:
        """softmax of a step: query [heads, group, rows, d], scaled, and key [heads, seen, d], the
        rows' own keys last -> ``out`` [heads, group x rows, seen]; ``scores`` is overwritten."""
        rows = query.shape[2]
        torch.bmm(query.flatten(1, 2), key.transpose(1, 2), out=scores)
        own = scores.unflatten(1, (-1, rows))[..., -rows:]
        own.masked_fill_(self._future[:rows, :rows], float("-inf"))
        torch.ops.aten._softmax.out(scores, -1, False, out=out)
        return out


class _Blockwise(torch.autograd.Function):
    """query [heads, group, n, d], key [heads, n, d], value [heads, n, w] -> [.., group, n, w]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        steps, scaled = _Steps(query, buffers=2), query * scaling
        for heads, rows in steps.blocks:
            maps = steps.maps(
                scaled[heads, :, rows], key[heads, : rows.stop], *steps.buffers(heads, rows)
            )
            part = torch.bmm(maps, value[heads, : rows.stop])
            output[heads, :, rows] = part.unflatten(1, (query.shape[1], -1))
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (query, key, value), scaling = ctx.saved_tensors, ctx.scaling
        steps, scaled = _Steps(query, buffers=3), query * scaling
        of_query = query.new_empty(query.shape)
        of_key, of_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        for heads, rows in steps.blocks:
            queries, keys = scaled[heads, :, rows], key[heads, : rows.stop]
            first, second, of_scores = steps.buffers(heads, rows)
            maps = steps.maps(queries, keys, first, second)
            outer = gradient[heads, :, rows].flatten(1, 2)
            of_value[heads, : rows.stop].baddbmm_(maps.transpose(1, 2), outer)
            of_maps = torch.bmm(outer, value[heads, : rows.stop].transpose(1, 2), out=first)
            torch.ops.aten._softmax_backward_data.out(
                of_maps, maps, -1, maps.dtype, grad_input=of_scores
            )
            of_query[heads, :, rows] = torch.bmm(of_scores, keys).mul_(scaling).view(queries.shape)
            of_key[heads, : rows.stop].baddbmm_(of_scores.transpose(1, 2), queries.flatten(1, 2))
        return of_query, of_key, of_value, None
