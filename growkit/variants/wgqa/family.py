"""Weighted GQA: key and value heads belong to query heads; w_k and w_v read them.

A query head is copied with its key and value head inside its group. Their weights in w_k and w_v
are shares, as columns of a projection are: w' + w'' = w keeps the group's sum, so growth is exact.
"""

from __future__ import annotations

from growkit.core.errors import UsageError
from growkit.families.base import Config, Dim, Tensor, consumes, produces
from growkit.families.decoder import (
    ATTENTION,
    attention_tensors,
    evenly_shared,
    flag,
    head_norm_tensors,
    hidden_out,
    query_rows,
)
from growkit.families.unit_layout import fixed, head_dim, plain
from growkit.variants.gqa.family import head_fields, head_sizes
from growkit.variants.shared.decoder_family import variant

WEIGHTS: dict[str, tuple[Dim, ...]] = {
    "scalar": (),
    "column": (produces(fixed(head_dim)),),
    "row": (hidden_out,),  # its channels are copied; k_proj's and v_proj's columns are shared
}


def _sizes(config: Config) -> dict[str, int]:
    kind = config.get("wgqa_weights") or "scalar"
    if kind not in WEIGHTS:
        raise UsageError(
            f"config.json has wgqa_weights = {kind!r}.", f"Valid values: {', '.join(WEIGHTS)}."
        )
    return head_sizes(config) | {f"{name}_weights": int(name == kind) for name in WEIGHTS}


def _weights() -> tuple[Tensor, ...]:
    """w_k and w_v in the form that the checkpoint has."""
    heads = consumes(plain("query_head"))
    return tuple(
        Tensor(
            f"{name}_{kind}",
            ATTENTION + name,
            (heads, *tail),
            flag(f"{kind}_weights"),
            own_start=True,
        )
        for name in ("w_k", "w_v")
        for kind, tail in WEIGHTS.items()
    )


OTHER_GROUPS = (
    "its key/value heads are sums over the heads of a group, and a new group would need heads of "
    "its own"
)
WGQA = variant(
    "wgqa",
    (
        *attention_tensors(query_rows, query_rows, query_rows),
        *head_norm_tensors(when=flag("qk_norm")),
        *_weights(),
    ),
    _sizes,
    head_fields,
    links=(evenly_shared("query_head", "kv_head"),),
    kv_elements=lambda sizes: 2 * sizes["kv_head"] * sizes["head_dim"],
    attention_flops=lambda sizes: 4 * sizes["query_head"] * sizes["head_dim"],
    refused={"--kv-heads": OTHER_GROUPS, "--heads": OTHER_GROUPS},
)
