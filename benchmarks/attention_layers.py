"""The layers that the benchmark of attention runs, their inputs, and one run of each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from growkit.families.lambda_schedule import LAMBDA_ROLES
from growkit.modeling import GdaConfig, GrowkitConfig
from growkit.modeling.modeling_gda import ATTENTION_CLASSES

BASELINE, OWN_KEYS = "gqa", "gda 3:1, own keys"
MODES = ("forward", "forward+backward")


def configs(heads: int, head_dim: int) -> dict[str, Any]:
    """Name -> config: ``heads`` query heads (a multiple of 8), four to a key head, equal width.

    Where a key head is a pair it counts twice; SAS simulates twice the heads, half as wide again.
    """
    kv = heads // 4
    shared = {
        "hidden_size": heads * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "max_position_embeddings": 1 << 15,
        "attn_implementation": "sdpa",
    }

    def ours(attention: str, **fields: Any) -> GrowkitConfig:
        return GrowkitConfig(
            **{**shared, "attention": attention, "num_key_value_heads": kv, **fields}
        )

    def grouped(keys: int, **fields: Any) -> GdaConfig:
        return GdaConfig(**shared, num_key_value_heads=kv * keys, num_noise_heads=kv, **fields)

    simulation = {
        "num_simulated_heads": 2 * heads,
        "simulated_head_dim": head_dim * 3 // 2,
        "sas_kernel_size": 5,
    }
    return {
        BASELINE: ours("gqa"),
        "gda 3:1, shared keys": grouped(1, noise_keys="shared", sub_layer_norm=False),
        OWN_KEYS: grouped(2, noise_keys="own"),
        "diff_v1": ours("diff_v1"),
        "diff_v2": ours("diff_v2"),
        "gda_gated 3:1": ours("gda_gated", num_noise_heads=kv),
        "shared_diff": ours("shared_diff", query_rank=8, key_rank=8),
        "shared_diff, queries only": ours("shared_diff", query_rank=8, key_rank=0),
        "wgqa": ours("wgqa"),
        "sas": ours("sas", **simulation),
    }


def layer_of(config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """One attention layer with torch's start weights; lambda vectors stay fp32."""
    torch.manual_seed(0)
    own = config.model_type == "gda"
    kind = ATTENTION_CLASSES[config.noise_keys] if own else config.variant
    layer: nn.Module = kind(config, 0)
    for name, parameter in layer.named_parameters():
        if name not in LAMBDA_ROLES:
            parameter.data = parameter.data.to(dtype)
    return layer.to(device)


def inputs_of(config: Any, n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Hidden states [1, n, hidden_size] that want a gradient, and cos and sin."""
    hidden = torch.randn(1, n, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    angles = torch.arange(n, device=device)[:, None] * 10000.0 ** (
        -torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    )
    angles = torch.cat((angles, angles), dim=-1)[None]
    return hidden, (angles.cos().to(dtype), angles.sin().to(dtype))


def step(layer: nn.Module, hidden: Tensor, rotary: Any, mode: str, mask: Any = None) -> None:
    """One run of the layer."""
    if mode == MODES[0]:
        with torch.no_grad():
            layer(hidden, rotary, mask)
        return
    output, _ = layer(hidden, rotary, mask)
    output.backward(torch.ones_like(output))
    layer.zero_grad(set_to_none=True)
    hidden.grad = None


def attention_inputs(config: Any, hidden: Tensor) -> list[Tensor]:
    """Query, key and value of the attention call of GQA, in the layout that projections leave."""
    n, kv = hidden.shape[1], config.num_key_value_heads
    return [
        torch.randn(1, n, heads, config.head_dim, device=hidden.device, dtype=hidden.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (config.num_attention_heads, kv, kv)
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, mode: str) -> None:
    """The attention call of GQA alone."""
    call = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if mode == MODES[0]:
        with torch.no_grad():
            call(query, key, value)
        return
    output = call(query, key, value)
    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
