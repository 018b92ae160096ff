# SPDX-License-Identifier: Apache-2.0
"""DIFF Transformer (V1): every head is the difference of two attention maps, normed by itself.

    A1 = softmax(q1 k1^T / sqrt(d)),   A2 = softmax(q2 k2^T / sqrt(d)),   v is 2d wide
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init              one fp32 scalar a layer
    o_i = (1 - lambda_init) * RMSNorm_2d((A1 - lambda A2) v),           y = W_O concat_i o_i

``num_attention_heads`` H = 2h and ``num_key_value_heads`` G count heads of width d as the
projections store them (a DIFF head is a pair, as is its key/value head). Layout of Microsoft's
reference (unilm, ``multihead_flashdiff_1.py``), with rotate-half rotary pairs:

* ``q_proj.weight`` [2h d, E]: rows (head, map): q1 and q2 of a head are **adjacent**;
* ``k_proj.weight`` [G d, E]: (kv head, map), adjacent too; ``v_proj.weight`` [G d, E]: (kv head,
  2d), the two rows of a pair read as one value of width 2d;
* ``o_proj.weight`` [E, 2h d]: columns (head, 2d);
* ``lambda_q1/k1/q2/k2`` [d] fp32; with ``sub_layer_norm`` ``subln.weight`` [2d].

DiffLlama stores the same numbers in halves, and unilm rotates pairs (2i, 2i + 1)
(``unilm_diff_v1.py``). Without ``sub_layer_norm`` norm and (1 - lambda_init) are absent (not in the
paper). This is Grouped Differential Attention with own noise keys at one noise head a signal head,
whose fast path it is.

Parameters of a layer: E d (2H + 2G) + 4d + 2d; KV cache: 2 G d elements a token.
Source: arXiv 2410.05258, section 2.1.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...families.lambda_schedule import lambda_init_schedule
from ..gda.attention import GdaAttention, GdaAttentionBase
from ..gda.heads import GdaHeads
from ..shared.definition import Definition, lambda_of
from ..shared.one_call import Positions


def diff_v1_reference(
    module: GdaAttentionBase,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    return diff_v1_definition(module, inputs)


def diff_v1_definition(module: GdaAttentionBase, inputs: Definition) -> Tensor:
    """The formula on the steps of ``inputs``; [batch, n, hidden_size]."""
    config, d = module.config, module.head_dim
    heads, kv_heads = config.num_attention_heads // 2, config.num_key_value_heads // 2
    outputs = []
    for i in range(heads):
        kv = i * kv_heads // heads
        maps = []
        for which in (0, 1):
            query = inputs.head(module.q_proj, 2 * i + which, d, module.q_norm, rotary=True)
            key = inputs.head(module.k_proj, 2 * kv + which, d, module.k_norm, rotary=True)
            maps.append(inputs.attention_map(query, key))
        value = inputs.head(module.v_proj, kv, 2 * d)
        output = (maps[0] - lambda_of(module) * maps[1]) @ value
        if module.subln is not None:
            output = (1 - module.lambda_init) * inputs.normed(output, module.subln)
        outputs.append(output)
    return inputs.output(outputs, module.o_proj)


class DiffV1Attention(GdaAttention):
    """DIFF V1 on the fast path of Grouped Differential Attention."""

    reference = staticmethod(diff_v1_reference)
    fields: ClassVar[tuple[str, ...]] = ("sub_layer_norm", "lambda_init")

    @classmethod
    def defaults(cls, config: Any) -> dict[str, Any]:
        """As many key/value as query heads, the norm, and the paper's schedule of lambda_init."""
        return super().defaults(config) | {
            "sub_layer_norm": True,
            "lambda_init": lambda_init_schedule(config.num_hidden_layers),
        }

    @classmethod
    def check(cls, config: Any) -> None:
        """Heads and kv heads come in pairs, and the kv pairs divide the heads."""
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv)):
            if count < 2 or count % 2:
                raise ValueError(
                    f"{name} = {count} with attention = {config.attention!r}: every head is a pair "
                    "(map 1, map 2), so it has to be a positive even number."
                )
        if heads % kv:
            fitting = [2 * n for n in range(1, heads // 2 + 1) if heads // 2 % n == 0]
            raise ValueError(
                f"num_key_value_heads = {kv} has to divide {heads} (num_attention_heads). "
                f"num_key_value_heads that fit: {fitting}."
            )

    @classmethod
    def heads_of(cls, config: Any) -> GdaHeads:
        """One noise head a signal head, keys of their own."""
        half = config.num_attention_heads // 2
        kv = config.num_key_value_heads // 2
        return GdaHeads(half, half, kv, config.head_dim, "own")
