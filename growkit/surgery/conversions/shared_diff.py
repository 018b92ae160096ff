"""Ordinary attention -> Shared DIFF with updates on the queries alone and no sub-layer norm.

Both maps of a head share the base W_Q, which is the source's; the low-rank updates begin with
random D and zero U, so both maps are the source's and (1 - lambda) A V is left; W_O is divided by
1 - lambda. Keys, values and KV cache are untouched. U gets a gradient at the first step, D at the
second. Source: arXiv 2501.17900 (abstract); our reading of it stands in growkit/attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

from growkit.errors import UsageError
from growkit.surgery.conversions.conversion import Converted
from growkit.surgery.conversions.differential import OWN_KEYS
from growkit.surgery.conversions.low_rank import ToLowRank
from growkit.surgery.conversions.ordinary import check_ordinary, growkit_fields
from growkit.surgery.growth import Exactness, ModelShape


@dataclass(frozen=True)
class ToSharedDiff:
    """With updates of ``rank`` and the constant part of lambda at ``mirror`` (None: 1/2)."""

    rank: int
    mirror: float | None = None
    key_rank: int | None = None

    def apply(self, shape: ModelShape) -> Converted:
        if shape.family.name in OWN_KEYS:
            return self._from_differential(shape)
        check_ordinary(shape)
        if self.key_rank is not None:
            raise UsageError(
                "--key-rank: from ordinary attention only the queries get updates, so that the KV "
                "cache stays as it is.",
                "Leave --key-rank out.",
            )
        mirror = 0.5 if self.mirror is None else self.mirror
        heads, dim = shape.sizes["query_head"], shape.sizes["head_dim"]
        if not 1 <= self.rank <= dim:
            raise UsageError(
                f"--rank {self.rank}: the updates of a head of {dim} channels cannot have it.",
                f"Give a number from 1 to {dim}.",
            )
        if not mirror < 1:
            raise UsageError(
                f"--mirror {mirror:g}: what is left of a map is (1 - lambda) of it.",
                "Give a number below 1; 0.5 and 0.75 are lossless in every dtype.",
            )
        factor = 1.0 / (1.0 - mirror)
        return Converted(
            config=growkit_fields(shape, "shared_diff")
            | {
                "num_attention_heads": 2 * heads,
                "num_key_value_heads": shape.sizes["kv_head"],
                "query_rank": self.rank,
                "key_rank": 0,
                "sub_layer_norm": False,
                "lambda_init": [mirror] * shape.sizes["layer"],
            },
            summary=f"{heads} query heads -> {heads} pairs of maps on one base, updates of rank "
            f"{self.rank}, lambda {mirror:g}",
            exactness=Exactness.EXACT if frexp(factor)[0] == 0.5 else Exactness.ROUNDED,
            reason="equal maps leave (1 - lambda) of one, the output is divided by it",
            factors={"o": factor},
            starts={"lambda_q1": "zeros", "lambda_q2": "zeros", "q_up": "zeros"},
        )

    def _from_differential(self, shape: ModelShape) -> Converted:
        if self.mirror is not None:
            raise UsageError(
                f"--mirror is for ordinary sources; this is {shape.family.name}, which has lambda.",
                "Leave --mirror out.",
            )
        return ToLowRank(self.rank, self.key_rank).apply(shape)
