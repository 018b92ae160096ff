"""Conversions between attention variants, one a file. Each turns a request into data."""

from __future__ import annotations

from collections.abc import Callable

from growkit.surgery.effect import Operator
from growkit.variants.diff_v1.convert import ToDiffV1
from growkit.variants.diffllama.convert import ToDifferential
from growkit.variants.gda.convert import ToGda
from growkit.variants.gda_gated.convert import ToGated
from growkit.variants.gqa.convert import ToKvHeads
from growkit.variants.plain.convert import Fold
from growkit.variants.sas.convert import ToSas
from growkit.variants.shared.choices import Choices
from growkit.variants.shared_diff.convert import ToSharedDiff
from growkit.variants.wgqa.convert import ToWgqa
from growkit.variants.wgqa_t5.convert import with_t5

# Value of --to -> how the conversion is made of the request. One line a conversion.
CONVERSIONS: dict[str, Callable[[Choices], Operator]] = {
    "plain": lambda request: Fold(request.format),
    "mha": lambda request: ToKvHeads(None),
    "gqa": lambda request: ToKvHeads(request.needed("kv_heads"), request.merge),
    "mqa": lambda request: ToKvHeads(1, request.merge),
    "gda": lambda request: ToGda(request.ratio, request.mirror),
    "gda_gated": lambda request: ToGated("gda_gated", request.ratio or 1),
    "diff_v1": lambda request: ToDiffV1(),
    "diffllama": lambda request: ToDifferential("diffllama"),
    "unilm_diff_v1": lambda request: ToDifferential("unilm_diff_v1"),
    "diff_v2": lambda request: ToGated("diff_v2"),
    "shared_diff": lambda request: ToSharedDiff(
        request.needed("rank"), request.mirror, request.key_rank
    ),
    "wgqa": lambda request: ToWgqa(request.kv_heads, request.wgqa_weights),
    "sas": lambda request: ToSas(
        request.simulated_heads, request.simulated_head_dim, request.kernel, request.seed
    ),
}

CONVERSIONS = with_t5(CONVERSIONS)

__all__ = ["CONVERSIONS", "Operator"]
