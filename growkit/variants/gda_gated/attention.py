# SPDX-License-Identifier: Apache-2.0
"""Token-gated Grouped Differential Attention: lambda is a sigmoid of the token, no norm.

    o_i = A_i v - sigmoid(lambda_i(x)) * A_j v,    y = W_O concat_i o_i,    lambda(x) = W_lambda x

for signal head i and the one noise head j of its group; both read the keys and values of one
grouped-query head, so all heads go through one ordinary attention call.
``num_attention_heads`` H = n_S + n_N, ``num_noise_heads`` n_N divides n_S,
``num_key_value_heads`` G divides n_N (a group never crosses a key/value head).

* ``q_proj.weight`` [H d, E]: **stripes**: n_N groups of (n_S / n_N signal heads, 1 noise head);
* ``k_proj.weight``, ``v_proj.weight`` [G d, E];
* ``o_proj.weight`` [E, n_S d], signal heads in order;
* ``lambda_proj.weight`` [n_S, E], no bias, signal heads in order.

At one signal head a noise head this is DIFF V2, tensor for tensor. Motif-3 (arXiv 2608.09119) has
this gate on top of latent (MLA) keys and an optional output gate, which are not built here.

Parameters of a layer: E (H d + 2 G d + n_S d + n_S); KV cache: 2 G d elements a token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..gda.heads import GdaHeads
from ..shared.definition import Definition
from ..shared.one_call import (
    HEADS_SPLIT,
    OneCallAttention,
    Positions,
    ProjectionHeads,
    check_divides,
)


def gda_gated_reference(
    module: GdaGatedAttention,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    heads, d = module.heads, module.head_dim
    ratio = heads.n_signal // heads.n_noise
    weights = torch.sigmoid(inputs.x @ module.lambda_proj.weight.double().T)
    outputs = []
    for i in range(heads.n_signal):
        group, place = divmod(i, ratio)
        kv = i * heads.n_kv // heads.n_signal
        key = inputs.head(module.k_proj, kv, d, module.k_norm, rotary=True)
        value = inputs.head(module.v_proj, kv, d)
        first = group * (ratio + 1)
        signal, noise = (
            inputs.attention_map(
                inputs.head(module.q_proj, row, d, module.q_norm, rotary=True), key
            )
            for row in (first + place, first + ratio)
        )
        outputs.append(signal @ value - weights[..., i : i + 1] * (noise @ value))
    return inputs.output(outputs, module.o_proj)


class GdaGatedAttention(OneCallAttention):
    """The gate for any ratio of signal to noise heads."""

    reference = staticmethod(gda_gated_reference)
    fields: ClassVar[tuple[str, ...]] = ("num_noise_heads",)
    tp_plan = HEADS_SPLIT | {"lambda_proj": "colwise"}

    @classmethod
    def noise_heads(cls, config: Any) -> int:
        """n_N of a config."""
        noise: int = config.num_noise_heads
        return noise

    @classmethod
    def defaults(cls, config: Any) -> dict[str, Any]:
        """One key/value head a group."""
        return {"num_key_value_heads": cls.noise_heads(config) or 1}

    @classmethod
    def check(cls, config: Any) -> None:
        """Noise heads divide signal heads, key/value heads divide noise heads."""
        total, noise = config.num_attention_heads, cls.noise_heads(config)
        if noise is None or not 0 < noise < total or (total - noise) % noise:
            fitting = [n for n in range(1, total) if (total - n) % n == 0]
            raise ValueError(
                f"num_noise_heads = {noise} with num_attention_heads = {total} (signal + noise): "
                "the noise heads have to divide the signal heads. num_noise_heads that fit: "
                f"{fitting}."
            )
        check_divides(
            config,
            "num_key_value_heads",
            noise,
            f"noise heads of num_attention_heads = {total}; a pair shares its keys",
        )

    @classmethod
    def heads_of(cls, config: Any) -> GdaHeads:
        """Head counts of a config."""
        noise = cls.noise_heads(config)
        signal = config.num_attention_heads - noise
        return GdaHeads(signal, noise, config.num_key_value_heads, config.head_dim, "shared")

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """All query heads, G key/value heads, the signal heads' outputs."""
        heads = cls.heads_of(config)
        output = heads.n_signal * config.head_dim
        return ProjectionHeads(config.num_attention_heads, heads.n_kv, heads.n_kv, output)

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.heads = self.heads_of(config)
        self.lambda_proj = nn.Linear(config.hidden_size, self.heads.n_signal, bias=False)

    def combine(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """signal - sigmoid(lambda) noise; a noise output is broadcast over its group."""
        stripe = [self.heads.signal_per_group, 1]
        signal, noise = output.unflatten(2, (-1, sum(stripe))).split(stripe, dim=-2)
        weight = torch.sigmoid(self.lambda_proj(hidden_states))
        weight = weight.unflatten(-1, (-1, self.heads.signal_per_group)).unsqueeze(-1)
        return self.o_proj((signal - weight * noise).flatten(2))
