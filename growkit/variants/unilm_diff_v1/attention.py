# SPDX-License-Identifier: Apache-2.0
"""DIFF V1 in the files of Microsoft's reference module: interleaved rotary pairs, ``out_proj``.

The formula, the head counts and the order of heads are those of ``diff_v1.py``. What differs:

* q and k are rotated in the pairs (2i, 2i + 1) of a head (GPT-J), not (i, i + d/2);
* the output projection is called ``out_proj``;
* the module has no options: lambda_init follows the layer index, every head has its norm with
  epsilon 1e-5, there are no biases, and d is hidden_size / ``num_attention_heads``.

The rotation of a pair does not depend on where its two channels stand, so with the channels of
every query and key head in the order 0, 2, 4 ... 1, 3, 5 ... the weights are those of ``diff_v1``:
the two layouts hold the same models (``growkit convert``). This class reads such files as they are;
train and serve ``diff_v1``.

Source: microsoft/unilm, ``Diff-Transformer/multihead_flashdiff_1.py``; arXiv 2410.05258.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ...families.lambda_schedule import follows_schedule
from ..diff_v1.attention import DiffV1Attention, diff_v1_definition
from ..gda.attention import GdaAttentionBase
from ..shared.definition import Definition
from ..shared.one_call import Positions


def rotate_interleaved(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding of the pairs (2i, 2i + 1); the shape of ``states`` [..., n, d] stays.

    ``cos`` and ``sin`` are those of rotate-half, [..., n, d], with equal halves.
    """
    half = states.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = states[..., ::2], states[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2)


class InterleavedDefinition(Definition):
    """The steps of the definitions with the reference's rotary pairs."""

    def rotated(self, states: Tensor) -> Tensor:
        """Rotary encoding of the pairs (2i, 2i + 1); [batch, n, d] -> the same."""
        result = torch.empty_like(states)
        for i in range(states.shape[-1] // 2):
            cos, sin = self.cos[..., i], self.sin[..., i]
            first, second = states[..., 2 * i], states[..., 2 * i + 1]
            result[..., 2 * i] = first * cos - second * sin
            result[..., 2 * i + 1] = first * sin + second * cos
        return result


def unilm_diff_v1_reference(
    module: GdaAttentionBase,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = InterleavedDefinition(hidden_states, position_embeddings, attention_mask)
    return diff_v1_definition(module, inputs)


class UnilmDiffV1Attention(DiffV1Attention):
    """DIFF V1 with the reference's rotary pairs and tensor names."""

    reference = staticmethod(unilm_diff_v1_reference)
    tp_plan: ClassVar[dict[str, str]] = {}  # a layout to read, not to serve

    @classmethod
    def check(cls, config: Any) -> None:
        """DIFF V1's counts, and no choice that the reference module does not have."""
        super().check(config)
        follows = follows_schedule(config.lambda_init, config.num_hidden_layers)
        for field, fits, why in (
            ("lambda_init", follows, "it follows the layer index: leave it out"),
            ("sub_layer_norm", config.sub_layer_norm, "every head has its norm"),
            ("attn_rms_norm_eps", config.attn_rms_norm_eps == 1e-5, "it is 1e-5"),
            ("attention_bias", not config.attention_bias, "there are none"),
            ("attention_output_bias", not config.attention_output_bias, "there is none"),
            ("qk_norm", not config.qk_norm, "there is none"),
            (
                "head_dim",
                config.head_dim * config.num_attention_heads == config.hidden_size,
                f"it is hidden_size / num_attention_heads, with hidden_size = {config.hidden_size} "
                f"and num_attention_heads = {config.num_attention_heads}",
            ),
        ):
            if not fits:
                raise ValueError(
                    f"{field} = {getattr(config, field)} with attention = {config.attention!r}: in "
                    f"the reference module {why}. 'diff_v1' has the choice."
                )

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.out_proj = self._modules.pop("o_proj")

    def __getattr__(self, name: str) -> Any:
        # The output projection by the name that it has in the other variants.
        return super().__getattr__("out_proj" if name == "o_proj" else name)

    def project(
        self, hidden_states: Tensor, position_embeddings: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [b, heads, n, d], rotated k and plain v [b, kv heads, n, d]."""
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        query, key = (
            rotate_interleaved(self.split_heads(projection(hidden_states)), cos, sin)
            for projection in (self.q_proj, self.k_proj)
        )
        return query, key, self.split_heads(self.v_proj(hidden_states))
