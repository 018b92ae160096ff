# SPDX-License-Identifier: Apache-2.0
"""SAS: simulated attention scores, and PEAA: parameter-efficient aggregation of their outputs.

Few trained heads are expanded into many simulated ones. Per token, z [heads, d] holds the heads:

    z1 = Conv_k(z): H -> H' heads;      z2 = z1 + Conv_k(ReLU(z1)): H' -> H'       for q, k and v
    u1 = W z2 + b:  d -> D' features;   u2 = u1 + W' ReLU(u1) + b'                 for q and k
    o  = attention of H' heads, q and k of width D', v of width d, scale 1 / sqrt(D')
    y  = W_O mean_j o_j + b_O           over the H'/H chunks o_j of H consecutive heads  (PEAA)

The convolutions run over the channels of a head (padding (k - 1) / 2) with the heads as channels:
they never mix tokens. k = 1 is the linear form. PEAA averages before the projection, which is the
same as averaging the projected chunks and H'/H times cheaper. ``num_attention_heads`` H,
``num_key_value_heads`` G (our extension: k and v are simulated from G heads; the paper has G = H),
``num_simulated_heads`` H', ``simulated_head_dim`` D', ``sas_kernel_size`` k.

Rotary encoding comes after the simulation, which mixes channels: on the first d of the D' features,
with the pairs and frequencies of d, so that features left as they are keep their encoding. The
released module places no rotary encoding. Head norms act before the simulation. Keys and values are
cached simulated and rotated.

* ``q_proj.weight`` [H d, E], ``k_proj.weight``, ``v_proj.weight`` [G d, E], ``o_proj.weight``
  [E, H d];
* ``simulate_q.heads`` [H', H, k] + [H'], ``simulate_q.heads_residual`` [H', H', k] + [H'],
  ``simulate_q.features`` [D', d] + [D'], ``simulate_q.features_residual`` [D', D'] + [D'];
  ``simulate_k`` alike with G for H, ``simulate_v`` without the features (in the released module:
  ``sas_q.0``, ``sas_q.1.process``, ``sas_q.2``, ``sas_q.3.process``).

Parameters of a layer: E d (2H + 2G) + H'(Hk + 2Gk) + 3 H'(H'k + 2) + 2 D'(d + D' + 2);
KV cache: H'(D' + d) elements a token.
Source: arXiv 2507.07694; chuanyang-Zheng/SAS ``SAS.py``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from ..shared.definition import Definition
from ..shared.one_call import (
    OneCallAttention,
    Positions,
    ProjectionHeads,
    check_divides,
    equal_widths_only,
)


def sas_reference(
    module: SimulatedAttention,
    hidden_states: Tensor,
    position_embeddings: Positions,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The definition, head by head in float64; arguments of :class:`Definition`."""
    inputs = Definition(hidden_states, position_embeddings, attention_mask)
    config, d = module.config, module.head_dim
    heads, simulated = config.num_attention_heads, config.num_simulated_heads

    def convolved(layer: Any, z: list[Tensor]) -> list[Tensor]:
        """z: one [batch, n, d] a head; channel c becomes sum_i sum_t W[h, i, t] z_i[c + t - p]."""
        weight, bias = layer.weight.double(), layer.bias.double()
        pad = (weight.shape[2] - 1) // 2
        padded = [functional.pad(head, (pad, pad)) for head in z]
        return [
            bias[h]
            + sum(
                weight[h, i, t] * padded[i][..., t : t + d]
                for i in range(len(z))
                for t in range(weight.shape[2])
            )
            for h in range(weight.shape[0])
        ]

    def simulation(of: HeadSimulation, z: list[Tensor]) -> list[Tensor]:
        first = convolved(of.heads, z)
        second = convolved(of.heads_residual, [torch.relu(head) for head in first])
        expanded = [a + b for a, b in zip(first, second, strict=True)]
        if of.features is None:
            return expanded
        result = []
        for head in expanded:
            u1 = head @ of.features.weight.double().T + of.features.bias.double()
            residual = of.features_residual
            u2 = u1 + torch.relu(u1) @ residual.weight.double().T + residual.bias.double()
            result.append(torch.cat((inputs.rotated(u2[..., :d]), u2[..., d:]), dim=-1))
        return result

    def all_heads(projection: nn.Module, count: int, norm: Any = None) -> list[Tensor]:
        return [inputs.head(projection, i, d, norm) for i in range(count)]

    kv = config.num_key_value_heads
    query = simulation(module.simulate_q, all_heads(module.q_proj, heads, module.q_norm))
    key = simulation(module.simulate_k, all_heads(module.k_proj, kv, module.k_norm))
    value = simulation(module.simulate_v, all_heads(module.v_proj, kv))
    attended = [inputs.attention_map(q, k) @ v for q, k, v in zip(query, key, value, strict=True)]
    chunks = range(0, simulated, heads)
    averaged = [torch.stack([attended[j + i] for j in chunks]).mean(0) for i in range(heads)]
    return inputs.output(averaged, module.o_proj)


class HeadSimulation(nn.Module):
    """Convolution over heads with a residual ReLU block, and for q and k the same over features."""

    def __init__(self, heads: int, config: Any, features: bool) -> None:
        super().__init__()
        simulated, kernel = config.num_simulated_heads, config.sas_kernel_size
        pad = (kernel - 1) // 2
        self.heads = nn.Conv1d(heads, simulated, kernel, padding=pad)
        self.heads_residual = nn.Conv1d(simulated, simulated, kernel, padding=pad)
        self.features: nn.Linear | None = None
        if features:
            self.features = nn.Linear(config.head_dim, config.simulated_head_dim)
            width = config.simulated_head_dim
            self.features_residual = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """[b, heads, n, d] -> [b, H', n, D' or d]."""
        # Sums stand in the memory of the products, which no gradient needs.
        z = _over_heads(self.heads, states)
        z = _over_heads(self.heads_residual, torch.relu(z)).add_(z)
        if self.features is not None:
            z = self.features(z)
            z = self.features_residual(torch.relu(z)).add_(z)
        return z


def _over_heads(layer: nn.Conv1d, states: Tensor) -> Tensor:
    """The convolution of every token's [heads, d], on [b, heads, n, d] as it is.

    A kernel one token high: the tokens are rows of an image whose channels are the heads, which
    saves the transposes of n small convolutions.
    """
    padding = (0, int(layer.padding[0]))
    return functional.conv2d(states, layer.weight.unsqueeze(2), layer.bias, padding=padding)


class SimulatedAttention(OneCallAttention):
    """SAS with PEAA; all simulated heads go through one attention call."""

    reference = staticmethod(sas_reference)
    fields: ClassVar[tuple[str, ...]] = (
        "num_simulated_heads",
        "simulated_head_dim",
        "sas_kernel_size",
    )

    @classmethod
    def check(cls, config: Any) -> None:
        """H' is a multiple of H, D' is even and no less than d, k is odd, G divides H."""
        for field in cls.fields:
            if (getattr(config, field) or 0) < 1:
                raise ValueError(
                    f"{field} = {getattr(config, field)} with attention = 'sas': it is required."
                )
        heads, simulated = config.num_attention_heads, config.num_simulated_heads
        check_divides(config, "num_key_value_heads", heads, "num_attention_heads")
        if simulated % heads:
            raise ValueError(
                f"num_simulated_heads = {simulated} with num_attention_heads = {heads}: the "
                "outputs are averaged in chunks of num_attention_heads, so it has to be a multiple."
            )
        if config.simulated_head_dim < config.head_dim:
            raise ValueError(
                f"simulated_head_dim = {config.simulated_head_dim} with head_dim = "
                f"{config.head_dim}: rotary encoding needs at least head_dim features."
            )
        if config.sas_kernel_size % 2 == 0:
            raise ValueError(
                f"sas_kernel_size = {config.sas_kernel_size}: it must be odd, so that a head keeps "
                "its width."
            )

    @classmethod
    def projection_heads(cls, config: Any) -> ProjectionHeads:
        """The trained heads."""
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        return ProjectionHeads(heads, kv, kv, heads * config.head_dim)

    @classmethod
    def engine_obstacle(cls, config: Any) -> str | None:
        """Simulated heads, which no engine looks for in a config."""
        return (
            f"attention runs over {config.num_simulated_heads} simulated heads of width "
            f"{config.simulated_head_dim}, not over num_attention_heads of head_dim"
        )

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.num_key_value_groups = 1
        self.scaling = config.simulated_head_dim**-0.5
        kv = config.num_key_value_heads
        self.simulate_q = HeadSimulation(config.num_attention_heads, config, features=True)
        self.simulate_k = HeadSimulation(kv, config, features=True)
        self.simulate_v = HeadSimulation(kv, config, features=False)

    def init_weights(self) -> None:
        """torch's start of convolutions and linear layers, as the released module has it.

        A small initializer_range would shrink every head by the width of a head, not of the model.
        """
        for simulation in (self.simulate_q, self.simulate_k, self.simulate_v):
            for layer in simulation.children():
                assert isinstance(layer, (nn.Conv1d, nn.Linear))
                bound = layer.weight[0].numel() ** -0.5
                init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
                init.uniform_(layer.bias, -bound, bound)

    def project(
        self, hidden_states: Tensor, position_embeddings: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Simulated q, k [b, H', n, D'], rotated in their first d features, and v [b, H', n, d]."""
        query, key, value = (
            simulate(self.split_heads(projection(hidden_states), norm))
            for simulate, projection, norm in (
                (self.simulate_q, self.q_proj, self.q_norm),
                (self.simulate_k, self.k_proj, self.k_norm),
                (self.simulate_v, self.v_proj, None),
            )
        )
        return (*(self.rotated(states, *position_embeddings) for states in (query, key)), value)

    def rotated(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary encoding of the first d features; [b, H', n, D'] -> the same.

        Split and joined once: slices would fill a whole gradient with zeros for each of them.
        Without gradients in the memory of ``states``.
        """
        half = self.head_dim // 2
        first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
        (cos1, cos2), (sin1, sin2) = (part.unsqueeze(1).chunk(2, dim=-1) for part in (cos, sin))
        turned = (
            torch.addcmul(first * cos1, second, sin1, value=-1),
            torch.addcmul(second * cos2, first, sin2),
        )
        if torch.is_grad_enabled():
            return torch.cat((*turned, rest), dim=-1)
        first.copy_(turned[0])
        second.copy_(turned[1])
        return states

    def attended_values(self, value: Tensor) -> Tensor:
        """Zeros up to the width of the keys, where the fused attention wants one width."""
        if equal_widths_only(self.config._attn_implementation, value.device.type):
            return functional.pad(value, (0, self.config.simulated_head_dim - self.head_dim))
        return value

    def combine(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """PEAA: the mean of the chunks of H heads, then one projection."""
        chunks = output[..., : self.head_dim].unflatten(2, (-1, self.config.num_attention_heads))
        return self.o_proj(chunks.mean(2).flatten(2))
