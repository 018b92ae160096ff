"""Token-gated GDA, and DIFF V2 as its 1:1 case: the same tensors under two config words.

lambda_proj has one row a signal head, which travels with the head. Growth that leaves the ratio 1:1
makes a ``gda_gated`` of a ``diff_v2``.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families import decoder
from growkit.families import differential as diff
from growkit.families.base import Config, Family, Tensor, produces, required
from growkit.families.unit_layout import Sizes, plain
from growkit.variants.gda.family import query_rows
from growkit.variants.shared.decoder_family import common_fields, common_sizes, variant


def _sizes_of(config: Config, noise: int) -> dict[str, int]:
    heads, kv = required(config, "num_attention_heads"), required(config, "num_key_value_heads")
    diff.check_head_counts(heads - noise, noise, kv)
    return common_sizes(config) | {
        "signal_head": heads - noise,
        "noise_head": noise,
        "kv_head": kv,
        "parts": 1,
    }


def _gated_sizes(config: Config) -> dict[str, int]:
    return _sizes_of(config, required(config, "num_noise_heads"))


def _v2_sizes(config: Config) -> dict[str, int]:
    heads = required(config, "num_attention_heads")
    if heads % 2:
        raise UsageError(
            f"config.json has num_attention_heads = {heads}.",
            "DIFF V2 counts both heads of every pair: use an even number.",
        )
    return _sizes_of(config, heads // 2)


def _v2_fields(sizes: Sizes) -> dict[str, Any]:
    return common_fields(sizes, sizes["signal_head"] + sizes["noise_head"], sizes["kv_head"])


def _gated_fields(sizes: Sizes) -> dict[str, Any]:
    return _v2_fields(sizes) | {"num_noise_heads": sizes["noise_head"]}


def _v2_refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["signal_head"] != sizes["noise_head"]:
        return "diff_v2 holds as many signal as noise heads"
    return _gated_refusal(config, sizes)


def _gated_refusal(config: Config, sizes: Sizes) -> str | None:
    if sizes["signal_head"] < sizes["noise_head"]:
        return (
            f"a token-gated signal head subtracts one noise head, and {sizes['noise_head']} noise "
            f"heads are more than {sizes['signal_head']} signal heads"
        )
    return None


def _from_v2(config: Config, family: Family, sizes: Sizes) -> dict[str, Any]:
    return dict(config) | {"attention": "gda_gated", "num_noise_heads": sizes["noise_head"]}


_TENSORS = (
    *decoder.attention_tensors(query_rows, decoder.key_rows, decoder.kv_rows, diff.signal_columns),
    *decoder.head_norm_tensors(when=decoder.flag("qk_norm")),
    Tensor(
        "lambda_proj",
        decoder.ATTENTION + "lambda_proj.weight",
        (produces(plain("signal_head")), decoder.hidden_in),
    ),
)
_FACTS: dict[str, Any] = {
    "links": diff.LINKS,
    "kv_elements": lambda sizes: 2 * sizes["kv_head"] * sizes["head_dim"],
    "attention_flops": diff.attention_flops,
}
GDA_GATED = variant(
    "gda_gated",
    _TENSORS,
    _gated_sizes,
    _gated_fields,
    refusal=_gated_refusal,
    adopt=_from_v2,
    **_FACTS,
)
DIFF_V2 = variant(
    "diff_v2", _TENSORS, _v2_sizes, _v2_fields, refusal=_v2_refusal, wider="gda_gated", **_FACTS
)
