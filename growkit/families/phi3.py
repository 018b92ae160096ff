"""Phi-3: Llama with q, k, v in one matrix, and gate, up in one.

Source: transformers ``models/phi3`` (5.23). Rows of qkv_proj: all query heads, all key heads, all
value heads; rows of gate_up_proj: all gates, all ups.
"""

from __future__ import annotations

from growkit.families.base import Config, Norm, Tensor
from growkit.families.decoder import (
    ATTENTION,
    LAYER,
    NO_BIASES,
    decoder,
    down_projection,
    fused_qkv,
    gate_up_rows,
    hidden_in,
    norm_tensors,
    outer_tensors,
    output_projection,
    sizes_with,
)
from growkit.families.head_dim_rules import HeadDimRule, PartialRotary
from growkit.families.unit_layout import Sizes


def _refusal(config: Config, sizes: Sizes) -> str | None:
    """Phi3Config checks the long-context factors against hidden_size, whatever head_dim says."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    expected = int(sizes["hidden"] // sizes["query_head"] * partial) // 2
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if isinstance(factors, list) and len(factors) != expected:
            return (
                f"Phi3Config wants {expected} numbers in rope {name} for hidden_size "
                f"{sizes['hidden']} with {sizes['query_head']} heads (it leaves head_dim out of "
                f"account); the config has {len(factors)}, one for each rotated pair"
            )
    return None


PHI3 = decoder(
    "phi3",
    (
        *outer_tensors(),
        *norm_tensors(),
        Tensor("qkv", ATTENTION + "qkv_proj.weight", (fused_qkv, hidden_in)),
        output_projection(),
        Tensor("gate_up", LAYER + "mlp.gate_up_proj.weight", (gate_up_rows, hidden_in)),
        down_projection(),
    ),
    sizes_with(facts=NO_BIASES),
    norm=Norm(eps=1e-5),
    head_dim=HeadDimRule(rotary=PartialRotary("partial_rotary_factor", 1.0)),
    windows_everywhere=True,
    refusal=_refusal,
)
