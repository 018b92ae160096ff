# SPDX-License-Identifier: Apache-2.0
"""The table of attention variants: what the config field ``attention`` may say."""

from __future__ import annotations

from .diff_v1.attention import DiffV1Attention
from .diff_v2.attention import DiffV2Attention
from .gda_gated.attention import GdaGatedAttention
from .gqa.attention import GroupedQueryAttention
from .sas.attention import SimulatedAttention
from .shared.one_call import AttentionBase
from .shared_diff.attention import SharedDiffAttention
from .unilm_diff_v1.attention import UnilmDiffV1Attention
from .wgqa.attention import WeightedGroupedQueryAttention

# One line a variant.
VARIANTS: dict[str, type[AttentionBase]] = {
    "gqa": GroupedQueryAttention,
    "diff_v1": DiffV1Attention,
    "diff_v2": DiffV2Attention,
    "gda_gated": GdaGatedAttention,
    "shared_diff": SharedDiffAttention,
    "wgqa": WeightedGroupedQueryAttention,
    "sas": SimulatedAttention,
    "unilm_diff_v1": UnilmDiffV1Attention,
}
