"""Shared DIFF: a head is its row block of the base and the updates of both its maps.

The units are output heads (``query_head``; num_attention_heads counts their maps, two a head) and
key heads, which without updates of the keys are plain and with them pairs of one base.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families import differential as diff
from growkit.families.base import Config, Tensor, consumes, produces, required
from growkit.families.decoder import (
    ATTENTION,
    attention_tensors,
    evenly_shared,
    flag,
    head_norm_tensors,
    hidden_in,
    key_rows,
    query_rows,
)
from growkit.families.unit_layout import Sizes, adjacent_parts, fixed, head_dim, plain, value_dim
from growkit.variants.gda.family import FRESH_LAMBDA_INIT, lambda_init_list, pair_rows
from growkit.variants.shared.decoder_family import common_fields, common_sizes, variant, with_norm


def _sizes(config: Config) -> dict[str, int]:
    maps, kv = required(config, "num_attention_heads"), required(config, "num_key_value_heads")
    rank = config.get("key_rank")
    parts = 2 if rank else 1
    if maps % 2 or kv % parts:
        raise UsageError(
            f"config.json has num_attention_heads = {maps} and num_key_value_heads = {kv}.",
            "Maps come in pairs, and with key_rank keys too: use even numbers.",
        )
    lambda_init_list(config)
    common = common_sizes(config)
    return common | {
        "query_head": maps // 2,
        "kv_head": kv // parts,
        "parts": parts,
        "value_dim": parts * common["head_dim"],
        "query_rank": required(config, "query_rank"),
        "key_rank": int(rank or 0),
        "sub_layer_norm": with_norm(config),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return common_fields(sizes, 2 * sizes["query_head"], sizes["parts"] * sizes["kv_head"])


def _updates(kind: str, axis: str) -> tuple[Tensor, ...]:
    """down [2 x heads x rank, hidden] and up [2 x heads x head_dim, rank]; maps adjacent."""
    word = {"q": "query_rank", "k": "key_rank"}[kind]

    def rank(sizes: Sizes) -> int:
        return sizes[word]

    def two(sizes: Sizes) -> int:
        return 2

    down = produces(adjacent_parts(axis, two, rank))
    up = produces(adjacent_parts(axis, two, head_dim))
    present = flag(word)
    return (
        Tensor(f"{kind}_down", f"{ATTENTION}{kind}_down.weight", (down, hidden_in), present),
        Tensor(f"{kind}_up", f"{ATTENTION}{kind}_up.weight", (up, produces(fixed(rank))), present),
    )


SHARED_DIFF = variant(
    "shared_diff",
    (
        *attention_tensors(
            query_rows, key_rows, pair_rows, consumes(plain("query_head", value_dim))
        ),
        *head_norm_tensors(when=flag("qk_norm")),
        *_updates("q", "query_head"),
        *_updates("k", "kv_head"),
        *diff.lambda_tensors(),
        diff.subln_tensor(),
    ),
    _sizes,
    _fields,
    links=(evenly_shared("query_head", "kv_head"),),
    kv_elements=lambda sizes: 2 * sizes["parts"] * sizes["kv_head"] * sizes["head_dim"],
    attention_flops=lambda s: 4 * s["query_head"] * (s["head_dim"] + s["value_dim"]),
    per_layer_fields=("lambda_init", "layer_types"),
    fresh_entries=FRESH_LAMBDA_INIT,
)
