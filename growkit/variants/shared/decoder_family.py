"""What the families of model type ``growkit`` share: one family an attention variant.

Source: our own ``growkit/modeling/configuration_growkit.py``; the layout of each variant stands in
the attention.py of its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from growkit.families.base import Config, Family, Tensor, required
from growkit.families.decoder import (
    basic_fields,
    basic_sizes,
    gated_ffn_tensors,
    norm_tensors,
    outer_tensors,
)
from growkit.families.differential import polynorm_needs_whole_copies, polynorm_tensors
from growkit.families.unit_layout import Sizes


def common_sizes(config: Config) -> dict[str, int]:
    """Sizes and facts that every variant has."""
    basic = basic_sizes(config)
    dim = config.get("head_dim") or basic["hidden"] // required(config, "num_attention_heads")
    return basic | {
        "head_dim": dim,
        "value_dim": dim,
        "attention_bias": int(bool(config.get("attention_bias"))),
        "output_bias": int(bool(config.get("attention_output_bias"))),
        "qk_norm": int(bool(config.get("qk_norm"))),
        "poly_norm": int(config.get("hidden_act") == "poly_norm"),
    }


def common_fields(sizes: Sizes, query_heads: int, kv_heads: int) -> dict[str, Any]:
    """Their config fields, with the head counts as the variant's config counts them."""
    return basic_fields(sizes) | {
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": sizes["head_dim"],
    }


def with_norm(config: Config) -> int:
    """Whether a variant with a sub-layer norm has it: yes, unless the config says no."""
    return int(config.get("sub_layer_norm") is not False)


def variant(
    attention: str,
    tensors: tuple[Tensor, ...],
    sizes: Callable[[Config], dict[str, int]],
    config_fields: Callable[[Sizes], dict[str, Any]],
    **facts: Any,
) -> Family:
    """The family of one value of the config field ``attention``.

    Args:
        attention: that value, and the name of the family.
        tensors: the tensors of the attention layer.
        sizes, config_fields: see :class:`Family`.
        facts: further attributes of :class:`Family`.
    """
    return Family(
        name=attention,
        model_types=("growkit",),
        attention=attention,
        tensors=(
            *outer_tensors(),
            *norm_tensors(),
            *tensors,
            *gated_ffn_tensors(),
            *polynorm_tensors(),
        ),
        sizes=sizes,
        config_fields=config_fields,
        full_copies_only=polynorm_needs_whole_copies,
        **facts,
    )
