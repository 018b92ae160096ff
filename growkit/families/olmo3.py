"""OLMo 3: OLMo 2 with attention windows in three layers of four.

Source: transformers ``models/olmo3`` (5.23).
"""

from __future__ import annotations

from growkit.families.decoder import decoder, full_attention_every, sizes_with
from growkit.families.head_dim import HEAD_NORM, HeadDimRule
from growkit.families.olmo2 import NORM, TENSORS, heads_normed_together

OLMO3 = decoder(
    "olmo3",
    TENSORS,
    sizes_with(facts={"mlp_bias": 0}),
    norm=NORM,
    head_dim=HeadDimRule(HEAD_NORM),
    full_copies_only=heads_normed_together,
    layer_rules={"layer_types": full_attention_every(4)},
)
