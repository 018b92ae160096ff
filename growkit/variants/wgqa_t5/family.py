"""T5 with grouped or weighted grouped-query attention in its decoder (model type ``growkit_t5``).

The encoder keeps one key/value head a query head: there they are one axis, ``query_head``. In the
decoder's self- and cross-attention ``kv_head`` counts the heads that are cached. Weighted: keys and
values belong to query heads everywhere, and w_k and w_v read the decoder's (see ``wgqa.py``).

Source: ``growkit/variants/wgqa_t5/attention.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Config, Dim, Tensor, consumes, produces, required
from growkit.families.decoder import flag, key_rows, kv_rows, query_rows
from growkit.families.head_dim_rules import HeadDimRule
from growkit.families.t5 import CROSS_ATTENTION, DECODER, SELF_ATTENTION, T5, t5_tensors
from growkit.families.unit_layout import Sizes, head_dim, plain
from growkit.variants.wgqa.family import OTHER_GROUPS, WEIGHTS

# Keys of heads that are counted with the query heads.
_own_keys = produces(plain("query_head", head_dim), keys=(("query_head", 0),))
_OWN: tuple[Dim, Dim] = (_own_keys, query_rows)


def _grouped_sizes(config: Config) -> dict[str, int]:
    sizes = T5.sizes(config)
    if config.get("decoder_num_key_value_heads") is not None:
        sizes["kv_head"] = required(config, "decoder_num_key_value_heads")
    return sizes


def _weighted_sizes(config: Config) -> dict[str, int]:
    kind = config.get("wgqa_weights") or "scalar"
    if kind not in WEIGHTS:
        raise UsageError(
            f"config.json has wgqa_weights = {kind!r}.", f"Valid values: {', '.join(WEIGHTS)}."
        )
    return _grouped_sizes(config) | {f"{name}_weights": int(name == kind) for name in WEIGHTS}


def _fields(sizes: Sizes) -> dict[str, Any]:
    return T5.config_fields(sizes) | {"decoder_num_key_value_heads": sizes["kv_head"]}


def _refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["query_head"] % sizes["kv_head"]:
        return (
            f"the decoder's {sizes['kv_head']} key/value heads do not divide its "
            f"{sizes['query_head']} query heads"
        )
    return None


def _weights() -> tuple[Tensor, ...]:
    """w_k and w_v of both attentions of a decoder block, in the form that the checkpoint has."""
    heads = consumes(plain("query_head"))
    return tuple(
        Tensor(
            f"{role}{name}_{kind}",
            f"{block}.{name}",
            (heads, *tail),
            flag(f"{kind}_weights"),
            own_start=True,
            stack=DECODER,
        )
        for role, block in (("decoder_", SELF_ATTENTION), ("cross_", CROSS_ATTENTION))
        for name in ("w_k", "w_v")
        for kind, tail in WEIGHTS.items()
    )


_COMMON: Mapping[str, Any] = {
    "model_types": ("growkit_t5",),
    "attention_field": "decoder_attention",
    "config_fields": _fields,
    "refusal": _refusal,
}
T5_GQA = replace(
    T5,
    name="t5_gqa",
    attention="gqa",
    tensors=t5_tensors(_OWN, (key_rows, kv_rows)),
    sizes=_grouped_sizes,
    **_COMMON,
)
T5_WGQA = replace(
    T5,
    name="t5_wgqa",
    attention="wgqa",
    tensors=(*t5_tensors(_OWN, _OWN), *_weights()),
    sizes=_weighted_sizes,
    head_dim=HeadDimRule("its weights w_k and w_v belong to the channels that there are"),
    refused={"--kv-heads": OTHER_GROUPS, "--heads": OTHER_GROUPS},
    **_COMMON,
)
