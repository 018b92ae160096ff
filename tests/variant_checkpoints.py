"""Tiny checkpoints of every attention variant of our own model type, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from growkit.modeling import GrowkitConfig, GrowkitForCausalLM

Config = dict[str, Any]

SIZES: Config = {
    "model_type": "growkit",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
}
EXTRAS: Config = {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}


def heads(query: int, kv: int, **fields: Any) -> Config:
    return {"num_attention_heads": query, "num_key_value_heads": kv} | fields


# One a form, every optional tensor in at least one of them.
VARIANTS: dict[str, Config] = {
    "gqa": heads(4, 2, attention="gqa", **EXTRAS),
    "diff_v1": heads(8, 4, attention="diff_v1", **EXTRAS),
    "diff_v1-plain": heads(8, 4, attention="diff_v1", sub_layer_norm=False),
    "diff_v2": heads(8, 2, attention="diff_v2", **EXTRAS),
    "gda_gated": heads(10, 1, attention="gda_gated", num_noise_heads=2, **EXTRAS),
    "shared_diff": heads(8, 4, attention="shared_diff", query_rank=2, key_rank=3, **EXTRAS),
    "shared_diff-q": heads(
        *(8, 2), attention="shared_diff", query_rank=2, key_rank=0, sub_layer_norm=False
    ),
    "wgqa": heads(4, 2, attention="wgqa", **EXTRAS),
    "wgqa-column": heads(4, 2, attention="wgqa", wgqa_weights="column"),
    "wgqa-row": heads(4, 2, attention="wgqa", wgqa_weights="row"),
    "sas": heads(
        *(2, 2),
        attention="sas",
        num_simulated_heads=4,
        simulated_head_dim=12,
        sas_kernel_size=3,
        **EXTRAS,
    ),
}


def variant_config(name: str, **changes: Any) -> GrowkitConfig:
    return GrowkitConfig(**(SIZES | VARIANTS[name] | changes))


def write_variant(
    path: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A folder with random gains, biases and weights of the merge too."""
    model = GrowkitForCausalLM(variant_config(name, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("bias") or "norm" in key or "subln" in key or "w_" in key:
                parameter += 0.3 * noise
            elif "lambda_" in key and parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    lambdas = {k: v for k, v in model.state_dict().items() if "lambda_" in k and v.dim() == 1}
    state = {k: v.to(dtype) for k, v in model.state_dict().items()} | lambdas
    model.to(dtype).save_pretrained(path, state_dict=state)
    return path
