"""A small config of every attention variant and form: what the tests of all variants run over."""

from __future__ import annotations

from typing import Any

import torch
from gda_cases import HEAD_DIM, HIDDEN, scatter_weights
from torch import nn

from growkit.modeling import GrowkitConfig, GrowkitForCausalLM

NORMED = {"qk_norm": True}
BIASED = {"attention_bias": True, "attention_output_bias": True}


def heads(query: int, kv: int, **fields: Any) -> dict[str, Any]:
    return {"num_attention_heads": query, "num_key_value_heads": kv} | fields


# Name -> config fields.
CASES: dict[str, dict[str, Any]] = {
    "mha": heads(4, 4, attention="gqa"),
    "gqa": heads(4, 2, attention="gqa", **NORMED, **BIASED),
    "mqa": heads(4, 1, attention="gqa"),
    "diff_v1": heads(8, 4, attention="diff_v1"),
    "diff_v1-plain": heads(4, 2, attention="diff_v1", sub_layer_norm=False, **NORMED, **BIASED),
    "diff_v2": heads(8, 2, attention="diff_v2"),
    "diff_v2-normed": heads(4, 2, attention="diff_v2", **NORMED, **BIASED),
    "gda_gated": heads(8, 2, attention="gda_gated", num_noise_heads=2),
    "gda_gated-mqa": heads(6, 1, attention="gda_gated", num_noise_heads=2, **NORMED, **BIASED),
    "shared_diff": heads(8, 4, attention="shared_diff", query_rank=3, key_rank=2),
    "shared_diff-plain": heads(
        *(4, 2),
        attention="shared_diff",
        query_rank=2,
        key_rank=1,
        sub_layer_norm=False,
        **NORMED,
        **BIASED,
    ),
    "shared_diff-q": heads(8, 2, attention="shared_diff", query_rank=3, key_rank=0),
    "shared_diff-q-plain": heads(
        *(4, 2), attention="shared_diff", query_rank=2, key_rank=0, sub_layer_norm=False
    ),
    "wgqa": heads(4, 2, attention="wgqa", **NORMED, **BIASED),
    "wgqa-column": heads(4, 1, attention="wgqa", wgqa_weights="column", **NORMED, **BIASED),
    "wgqa-row": heads(6, 2, attention="wgqa", wgqa_weights="row", **NORMED),
    "sas": heads(
        *(2, 2), attention="sas", num_simulated_heads=6, simulated_head_dim=12, sas_kernel_size=3
    ),
    "sas-linear": heads(
        *(4, 2),
        attention="sas",
        num_simulated_heads=4,
        simulated_head_dim=8,
        sas_kernel_size=1,
        **NORMED,
        **BIASED,
    ),
    "unilm_diff_v1": heads(4, 2, attention="unilm_diff_v1"),
}
# Cases whose heads go through more than one call of the attention function, and why.
TWO_CALLS = {
    case
    for case in CASES
    if case in ("diff_v1", "diff_v1-plain", "shared_diff", "shared_diff-plain", "unilm_diff_v1")
}  # two keys, wide values


def config_of(case: str, implementation: str = "eager", **fields: Any) -> GrowkitConfig:
    return GrowkitConfig(
        **{
            "vocab_size": 61,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "head_dim": HEAD_DIM,
            "pad_token_id": 0,
            "attn_implementation": implementation,
            **CASES[case],
            **fields,
        }
    )


def layer_of(case: str, implementation: str = "eager", **fields: Any) -> nn.Module:
    config = config_of(case, implementation, **fields)
    return scatter_weights(config.variant(config, 1))


def model_of(case: str, implementation: str = "sdpa", **fields: Any) -> GrowkitForCausalLM:
    model = GrowkitForCausalLM(config_of(case, implementation, **fields))
    return scatter_weights(model).eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (batch, length), generator=generator)
