"""Conversions between attention variants, one a file. Each turns a request into data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from growkit.surgery.conversions.conversion import Conversion
from growkit.surgery.conversions.diff_v1 import ToDiffV1
from growkit.surgery.conversions.differential import ToDifferential
from growkit.surgery.conversions.fold import Fold
from growkit.surgery.conversions.gated import ToGated
from growkit.surgery.conversions.gda import ToGda
from growkit.surgery.conversions.kv_heads import ToKvHeads
from growkit.surgery.conversions.sas import ToSas
from growkit.surgery.conversions.shared_diff import ToSharedDiff
from growkit.surgery.conversions.t5 import with_t5
from growkit.surgery.conversions.wgqa import ToWgqa

if TYPE_CHECKING:
    from growkit.surgery.conversion_request import ConversionRequest

# Value of --to -> how the conversion is made of the request. One line a conversion.
CONVERSIONS: dict[str, Callable[[ConversionRequest], Conversion]] = {
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

__all__ = ["CONVERSIONS", "Conversion"]
