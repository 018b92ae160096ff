"""DIFF V1 of our own model type: GDA with own keys at one noise head a signal head.

Growth that leaves that ratio is written as ``gda``, which has the same tensors.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families import differential as diff
from growkit.families.base import Config, required
from growkit.families.unit_layout import Sizes
from growkit.variants.gda.family import (
    FRESH_LAMBDA_INIT,
    GDA,
    lambda_init_list,
    pair_rows,
    query_rows,
    stored_lambda_init,
)
from growkit.variants.shared.decoder_family import common_fields, common_sizes, variant, with_norm


def _sizes(config: Config) -> dict[str, int]:
    heads = required(config, "num_attention_heads")
    kv = required(config, "num_key_value_heads")
    if heads % 2 or kv % 2:
        raise UsageError(
            f"config.json has num_attention_heads = {heads} and num_key_value_heads = {kv}.",
            "DIFF V1 needs an even number of both: heads are pairs.",
        )
    diff.check_head_counts(heads // 2, heads // 2, kv // 2, "num_attention_heads")
    lambda_init_list(config)
    common = common_sizes(config)
    return common | {
        "signal_head": heads // 2,
        "noise_head": heads // 2,
        "kv_head": kv // 2,
        "parts": 2,
        "value_dim": 2 * common["head_dim"],
        "sub_layer_norm": with_norm(config),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    heads = sizes["signal_head"] + sizes["noise_head"]
    return common_fields(sizes, heads, 2 * sizes["kv_head"])


def _refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["signal_head"] != sizes["noise_head"]:
        return "diff_v1 holds as many signal as noise heads"
    return None


DIFF_V1 = variant(
    "diff_v1",
    (*diff.attention_tensors(query_rows, pair_rows, pair_rows), diff.subln_tensor()),
    _sizes,
    _fields,
    links=diff.LINKS,
    kv_elements=GDA.kv_elements,
    attention_flops=diff.attention_flops,
    per_layer_fields=GDA.per_layer_fields,
    fresh_entries=FRESH_LAMBDA_INIT,
    lambda_init=stored_lambda_init,
    refusal=_refusal,
    wider="gda",
)
