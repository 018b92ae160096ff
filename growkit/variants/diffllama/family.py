"""DiffLlama, the DIFF V1 class in transformers: signal and noise heads in halves, 1:1.

Source: transformers ``models/diffllama`` (5.23). The per-head norm has no weight; lambda_init comes
from the layer index (arXiv 2410.05258).
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families import differential as diff
from growkit.families.base import Config, Family, Norm, produces, required
from growkit.families.decoder import (
    basic_fields,
    basic_sizes,
    gated_ffn_tensors,
    norm_tensors,
    outer_tensors,
)
from growkit.families.head_dim_rules import OUTPUT_NORM, HeadDimRule
from growkit.families.lambda_schedule import diff_lambda_init
from growkit.families.unit_layout import Sizes, halves, head_dim, split_parts


def _sizes(config: Config) -> dict[str, int]:
    heads = required(config, "num_attention_heads")
    kv = config.get("num_key_value_heads") or heads
    if heads % 2 or kv % 2:
        raise UsageError(
            f"config.json has num_attention_heads = {heads} and num_key_value_heads = {kv}.",
            "DiffLlama needs an even number of both: half are signal, half are noise heads.",
        )
    if config.get("attention_bias"):
        raise UsageError(
            "config.json has attention_bias = true.", "DiffLlama is supported without biases."
        )
    sizes = basic_sizes(config)
    dim = config.get("head_dim") or sizes["hidden"] // heads
    return (
        sizes
        | diff.PLAIN_HEADS
        | {
            "signal_head": heads // 2,
            "noise_head": heads // 2,
            "kv_head": kv // 2,
            "parts": 2,
            "head_dim": dim,
            "value_dim": 2 * dim,
            "sub_layer_norm": 0,
            "poly_norm": 0,
        }
    )


def _fields(sizes: Sizes) -> dict[str, Any]:
    return basic_fields(sizes) | {
        "num_attention_heads": sizes["signal_head"] + sizes["noise_head"],
        "num_key_value_heads": 2 * sizes["kv_head"],
        "head_dim": sizes["head_dim"],
    }


def _refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["signal_head"] != sizes["noise_head"]:
        return "DiffLlama holds as many signal as noise heads"
    return None


query_rows = produces(halves("signal_head", "noise_head"))
split_rows = produces(split_parts("kv_head", 2, head_dim))

DIFFLLAMA = Family(
    name="diffllama",
    model_types=("diffllama",),
    tensors=(
        *outer_tensors(),
        *norm_tensors(),
        *diff.attention_tensors(query_rows, split_rows, split_rows),
        *gated_ffn_tensors(),
    ),
    links=diff.LINKS,
    sizes=_sizes,
    config_fields=_fields,
    kv_elements=lambda sizes: 4 * sizes["kv_head"] * sizes["head_dim"],
    head_dim=HeadDimRule(OUTPUT_NORM),
    attention_flops=diff.attention_flops,
    norm=Norm("rms_norm_eps", 1e-5, False, "the norms of the heads' outputs", ("v",)),
    refusal=_refusal,
    wider="gda",
    lambda_init=lambda config, layer: diff_lambda_init(layer),
    gainless_head_norm=True,
    lambda_scale_role="o",
)
