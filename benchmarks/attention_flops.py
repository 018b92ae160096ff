"""FLOPs of one attention layer in closed form: products with weights, scores and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from growkit.variants.gda.attention import GdaAttentionBase


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of one sequence (a multiply and an add are two).

    Attributes:
        weights: products with weights: projections, updates, simulations, gates.
        scores: q k^T of all maps.
        values: A v of all maps.
    """

    weights: float
    scores: float
    values: float

    def flops(self, backward: bool) -> float:
        """Of a forward pass, or of a forward and a backward pass."""
        return sum(self.kinds(backward))

    def kinds(self, backward: bool) -> tuple[float, float]:
        """Of the products with weights, and of the attention calls.

        Backward: every product has two gradients, and a fused kernel computes the scores again.
        """
        attention = self.scores + self.values
        if not backward:
            return self.weights, attention
        return 3 * self.weights, 3 * attention + self.scores


def work_of(config: Any, n: int, *, causal: bool = True, wide_values: bool = True) -> Work:
    """Work of one layer on ``n`` tokens.

    Args:
        causal: a token meets only itself and the tokens before it, as in fused kernels; False
            counts all n x n products.
        wide_values: values of another width than the keys' in one call; False: own-keys forms
            compute their scores once for each half, SAS pads its values to the width of its keys.
    """
    gda = config.model_type == "gda"
    kind = GdaAttentionBase if gda else config.variant
    attention = "gda" if gda else config.attention
    d, hidden = config.head_dim, config.hidden_size
    heads = kind.projection_heads(config)
    rows = (heads.query + heads.key + heads.value) * d
    maps, width, value_width, per_token = config.num_attention_heads, d, d, 0
    if attention in ("diff_v1", "shared_diff", "gda"):
        value_width = kind.heads_of(config).value_dim
    if attention in ("diff_v2", "gda_gated"):
        per_token = hidden * kind.heads_of(config).n_signal  # lambda_proj
    if attention == "shared_diff":
        layout = kind.heads_of(config)
        updates = layout.n_signal * config.query_rank + layout.n_kv * config.key_rank
        per_token = 2 * updates * (hidden + d)
    if attention == "wgqa":  # merged weights; the merge itself does not grow with n
        rows = (heads.query + 2 * config.num_key_value_heads) * d
    if attention == "sas":
        maps, width = config.num_simulated_heads, config.simulated_head_dim
        k, kv = config.sas_kernel_size, config.num_key_value_heads
        per_token = d * maps * k * (config.num_attention_heads + 2 * kv + 3 * maps)
        per_token += 2 * maps * width * (d + width)
    pairs = n * (n + 1) / 2 if causal else n * n
    score_calls = 1 if wide_values or value_width == d else 2
    if attention == "sas" and not wide_values:
        value_width = width
    return Work(
        weights=2.0 * n * (hidden * (rows + heads.output) + per_token),
        scores=2.0 * pairs * maps * width * score_calls,
        values=2.0 * pairs * maps * value_width,
    )
