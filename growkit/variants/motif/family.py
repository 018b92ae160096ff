"""Motif 2.6B (DIFF V1) and Motif-2-12.7B (GDA): the layout that ours follows.

Source: MotifTechnologies/vllm ``motif.py`` (operator and layout); lambda_init comes from the layer
index, one layer later than DIFF's. transformers holds no class for it: our GDA model, which has the
same layout and names, reads it for verification.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families import differential as diff
from growkit.families.base import Config, Family, required
from growkit.families.decoder import basic_fields, basic_sizes
from growkit.families.head_dim_rules import OUTPUT_NORM, HeadDimRule
from growkit.families.lambda_schedule import motif_lambda_init
from growkit.families.unit_layout import Sizes
from growkit.variants.gda.family import GDA


def _sizes(config: Config) -> dict[str, int]:
    heads = required(config, "num_attention_heads")
    sizes = basic_sizes(config)
    noise = config.get("num_noise_heads")
    dim = config.get("head_dim")
    if noise is not None and not dim:
        raise UsageError(
            f"config.json has num_noise_heads = {noise} without head_dim.",
            "Add head_dim: with unequal groups it cannot be derived from hidden_size.",
        )
    if config.get("k_ratio", 1) != 1:
        raise UsageError(
            f"config.json has k_ratio = {config['k_ratio']}.", "Only k_ratio 1 is supported."
        )
    noise = noise or heads // 2
    dim = dim or sizes["hidden"] // heads
    stored_kv = config.get("num_key_value_heads") or heads
    if stored_kv % 2:
        raise UsageError(
            f"config.json has num_key_value_heads = {stored_kv}.",
            "Signal and noise keys come in pairs: use an even number.",
        )
    kv = stored_kv // 2
    diff.check_head_counts(heads - noise, noise, kv)
    return (
        sizes
        | diff.PLAIN_HEADS
        | {
            "signal_head": heads - noise,
            "noise_head": noise,
            "kv_head": kv,
            "parts": 2,
            "head_dim": dim,
            "value_dim": 2 * dim,
            "sub_layer_norm": 1,
            "poly_norm": int(config.get("hidden_act", "poly_norm") == "poly_norm"),
        }
    )


def _fields(sizes: Sizes) -> dict[str, Any]:
    # num_noise_heads also at 1:1, where the format may leave it out: a source that states it would
    # keep its old number otherwise.
    return basic_fields(sizes) | {
        "num_attention_heads": sizes["signal_head"] + sizes["noise_head"],
        "num_noise_heads": sizes["noise_head"],
        "num_key_value_heads": 2 * sizes["kv_head"],
        "head_dim": sizes["head_dim"],
    }


def _refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["signal_head"] < sizes["noise_head"]:
        return "the Motif format has at least as many signal as noise heads"
    return None


MOTIF = Family(
    name="motif",
    model_types=("motif", "Motif"),
    tensors=GDA.tensors,
    links=diff.LINKS,
    sizes=_sizes,
    config_fields=_fields,
    kv_elements=GDA.kv_elements,
    head_dim=HeadDimRule(OUTPUT_NORM),
    attention_flops=diff.attention_flops,
    refusal=_refusal,
    wider="gda",
    lambda_init=lambda config, layer: motif_lambda_init(layer),
    lambda_scale_role="subln",
    full_copies_only=diff.polynorm_needs_whole_copies,
)
