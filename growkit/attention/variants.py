# SPDX-License-Identifier: Apache-2.0
"""The table of attention variants: what the config field ``attention`` may say."""

from __future__ import annotations

from .diff_v1 import DiffV1Attention
from .diff_v2 import DiffV2Attention
from .gda_gated import GdaGatedAttention
from .gqa import GroupedQueryAttention
from .one_call import AttentionBase
from .sas import SimulatedAttention
from .shared_diff import SharedDiffAttention
from .unilm_diff_v1 import UnilmDiffV1Attention
from .wgqa import WeightedGroupedQueryAttention

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
