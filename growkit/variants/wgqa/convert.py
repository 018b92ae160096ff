"""Ordinary attention -> weighted GQA: as many trained key/value heads as query heads, merged by w.

To as many groups as the source has key/value heads it is exact: the trained heads of a group share
the source's head (by the symmetry, so that they differ and add up to it) and their weights are 1.
To fewer groups it is not: weights start at the mean pool (arXiv 2407.10855, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from growkit.core.errors import UsageError
from growkit.families.differential import divisors
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Alias, Effect, Exactness, ModelShape, Operator, filled
from growkit.variants.request import ConversionRequest
from growkit.variants.shared.from_ordinary import check_ordinary, growkit_fields

WEIGHTS = ("scalar", "column", "row")
KEYS_AND_VALUES = ("k", "v", "k_bias", "v_bias")


@dataclass(frozen=True)
class ToWgqa:
    """To ``groups`` merged key/value heads with ``weights`` of one kind; None: the source's."""

    groups: int | None = None
    weights: str = "scalar"

    def apply(self, shape: ModelShape) -> Effect:
        check_ordinary(shape)
        heads, kv, dim = (shape.sizes[name] for name in ("query_head", "kv_head", "head_dim"))
        groups = self.groups or kv
        if self.weights not in WEIGHTS:
            raise UsageError(
                f"--wgqa-weights {self.weights!r} is not known.",
                f"Valid values: {', '.join(WEIGHTS)}.",
            )
        if groups < 1 or kv % groups:
            raise UsageError(
                f"--kv-heads {groups} does not divide the {kv} key/value heads.",
                f"Numbers that fit: {divisors(kv)}.",
            )
        if self.weights == "row" and shape.sizes["attention_bias"]:
            raise UsageError(
                "--wgqa-weights row: the key and value projections have biases, which a weight of "
                "an input row cannot scale.",
                "Valid values for this checkpoint: scalar, column.",
            )
        tail = {"scalar": (), "column": (dim,), "row": (shape.sizes["hidden"],)}[self.weights]
        weight = filled((heads, *tail), groups / kv)
        return Effect(
            config=growkit_fields(shape, "wgqa")
            | {
                "num_attention_heads": heads,
                "num_key_value_heads": groups,
                "wgqa_weights": self.weights,
                "wgqa_init": "mean",
            },
            summary=f"{kv} key/value heads -> {heads} trained heads, merged to {groups} by "
            f"{self.weights} weights",
            exactness=Exactness.EXACT if groups == kv else Exactness.NOT_EXACT,
            reason="the trained heads of a group add up to its head"
            if groups == kv
            else "starts at the mean of the merged heads",
            by_role=dict.fromkeys(
                KEYS_AND_VALUES,
                ({"query_head": Alias("kv_head")}, {"query_head": AxisMap.spread(kv, heads)}),
            ),
            computed={f"w_k_{self.weights}": weight, f"w_v_{self.weights}": weight},
            shared_rows=frozenset(KEYS_AND_VALUES),
        )


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "wgqa": lambda request: ToWgqa(request.kv_heads, request.wgqa_weights),
}
