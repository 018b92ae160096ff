"""Ordinary attention -> Shared DIFF without sub-layer norm.

Both maps of a head share the base W_Q, which is the source's; the low-rank updates begin with
random D and zero U, so both maps are the source's and (1 - lambda) A V is left; W_O is divided by
1 - lambda. Two forms:

* updates on the queries alone (``key_rank`` 0): keys, values and KV cache are untouched;
* updates on the keys too: the maps have keys of their own, of the base W_K, and the layout of DIFF
  V1 then gives a key/value head a value of width 2d. Its first half is the source's value, its
  second half is new (random rows) and W_O does not read it yet (zero columns):
  (A v | A v') (W_O | 0)^T = A v W_O^T. The KV cache doubles. (Two old value heads as the halves of
  one would keep its size and lose the function: one map then serves both, and they had two.)

The maps are linear in V, so nothing but lambda has to be undone; a norm would. U and the new
columns of W_O get a gradient at the first step, D and the new values at the second. Source: arXiv
2501.17900 (abstract); our reading of it stands in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import frexp, isfinite

import numpy as np

from growkit.core.errors import UsageError
from growkit.surgery.axis_map import NEW, AxisMap
from growkit.surgery.effect import Alias, Effect, Exactness, ModelShape, Operator, UnitMaps
from growkit.variants.diffllama.convert import OWN_KEYS
from growkit.variants.request import ConversionRequest
from growkit.variants.shared.from_ordinary import check_ordinary, growkit_fields
from growkit.variants.shared_diff.low_rank import ToLowRank


@dataclass(frozen=True)
class ToSharedDiff:
    """With updates of the queries of ``rank``, of the keys of ``key_rank``.

    Attributes:
        rank: from 1 to head_dim.
        mirror: the constant part of lambda; None: 1/2.
        key_rank: 0: no updates of the keys. None: none from ordinary attention, ``rank`` from a
            differential format.
    """

    rank: int
    mirror: float | None = None
    key_rank: int | None = None

    def apply(self, shape: ModelShape) -> Effect:
        if shape.family.name in OWN_KEYS:
            return self._from_differential(shape)
        check_ordinary(shape)
        key_rank = self.key_rank or 0
        mirror = 0.5 if self.mirror is None else self.mirror
        self._check(shape.sizes["head_dim"], key_rank, mirror)
        heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
        factor = 1.0 / (1.0 - mirror)
        ranks = f"rank {self.rank}" + (f" (queries) and {key_rank} (keys)" if key_rank else "")
        return Effect(
            config=growkit_fields(shape, "shared_diff")
            | {
                "num_attention_heads": 2 * heads,
                "num_key_value_heads": 2 * kv if key_rank else kv,
                "query_rank": self.rank,
                "key_rank": key_rank,
                "sub_layer_norm": False,
                "lambda_init": [mirror] * shape.sizes["layer"],
            },
            summary=f"{heads} query heads -> {heads} pairs of maps on one base, updates of "
            f"{ranks}, lambda {mirror:g}" + ("; values get a second half" if key_rank else ""),
            exactness=Exactness.EXACT if frexp(factor)[0] == 0.5 else Exactness.ROUNDED,
            reason="equal maps leave (1 - lambda) of one, the output is divided by it",
            factors={"o": factor},
            starts={"lambda_q1": "zeros", "lambda_q2": "zeros", "q_up": "zeros", "k_up": "zeros"},
            by_role=_wide_values(shape.sizes["head_dim"]) if key_rank else {},
        )

    def _check(self, dim: int, key_rank: int, mirror: float) -> None:
        for option, rank, least in (("--rank", self.rank, 1), ("--key-rank", key_rank, 0)):
            if not least <= rank <= dim:
                raise UsageError(
                    f"{option} {rank}: the updates of a head of {dim} channels cannot have it.",
                    f"Give a number from {least} to {dim}"
                    + (" (0: the keys get no updates)." if not least else "."),
                )
        if not (isfinite(mirror) and mirror < 1):
            raise UsageError(
                f"--mirror {mirror:g}: what is left of a map is (1 - lambda) of it.",
                "Give a number below 1; 0.5 and 0.75 are lossless in every dtype.",
            )

    def _from_differential(self, shape: ModelShape) -> Effect:
        if self.mirror is not None:
            raise UsageError(
                f"--mirror is for ordinary sources; this is {shape.family.name}, which has lambda.",
                "Leave --mirror out.",
            )
        return ToLowRank(self.rank, self.key_rank).apply(shape)


def _wide_values(dim: int) -> dict[str, UnitMaps]:
    """The first half of a value of 2 ``dim`` channels is the source's, the second is new."""
    halves: UnitMaps = ({"kv_head": Alias("kv_head", {0: 0})}, {})
    channels = np.concatenate([np.arange(dim), np.full(dim, NEW)])
    columns: UnitMaps = ({}, {"head_dim": AxisMap(channels, dim)})
    return {"v": halves, "v_bias": halves, "o": columns}


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "shared_diff": lambda request: ToSharedDiff(
        request.needed("rank"), request.mirror, request.key_rank
    ),
}
