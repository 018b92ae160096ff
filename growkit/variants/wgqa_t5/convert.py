"""T5's decoder to and from grouped and weighted grouped-query attention; the encoder stays T5's.

Both attentions of every decoder block are converted alike. Every query head of T5 has a key/value
head of its own, so fewer of them are another function (arXiv 2305.13245, 2407.10855); as many, or
more out of fewer, are exact. The merge of WGQA is linear and nothing stands between it and the
scores, so a fold is exact whatever the weights multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.core.errors import UsageError, nearest
from growkit.families.t5 import MT5_DEFAULTS
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import (
    Alias,
    Effect,
    Exactness,
    ModelShape,
    Operator,
    UnitMaps,
    constant_rows,
)
from growkit.variants.gqa.convert import ToKvHeads, merged
from growkit.variants.plain.convert import merged_heads
from growkit.variants.request import ConversionRequest
from growkit.variants.wgqa.family import WEIGHTS

STATES = ("k", "v")
DECODER_STATES = tuple(f"{block}_{state}" for block in ("decoder", "cross") for state in STATES)
UPTRAINING = "merged heads need uptraining: about 5 % of the pretraining tokens in arXiv 2305.13245"


def _config(shape: ModelShape, groups: int, **fields: Any) -> dict[str, Any]:
    """config.json with ``groups`` key/value heads in the decoder; T5's own where it can hold it."""
    own = ("decoder_num_key_value_heads", "decoder_attention", "wgqa_weights", "wgqa_init")
    kept = {k: v for k, v in shape.config.items() if k not in (*own, "auto_map")}
    if kept.get("model_type") == "mt5":  # T5's class has other defaults, and scales what it ties
        kept.pop("scale_decoder_outputs", None)
        kept = MT5_DEFAULTS | kept | {"tie_word_embeddings": False}
    if groups == shape.sizes["query_head"] and not fields:
        return kept | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    return kept | {
        "model_type": "growkit_t5",
        "architectures": ["GrowkitT5ForConditionalGeneration"],
        "decoder_num_key_value_heads": groups,
        "decoder_attention": "gqa",
        **fields,
    }


def _encoder(shape: ModelShape, config: Mapping[str, Any]) -> dict[str, UnitMaps]:
    """T5 calls the encoder's heads key/value heads, growkit_t5 query heads: they are the same."""
    before = "kv_head" if shape.family.name == "t5" else "query_head"
    after = "kv_head" if config["model_type"] == "t5" else "query_head"
    heads = AxisMap.identity(shape.sizes["query_head"])
    return dict.fromkeys(STATES, ({after: Alias(before)}, {after: heads}))


def _refuse_weighted(shape: ModelShape, to: str) -> None:
    if shape.family.name == "t5_wgqa":
        raise UsageError(
            f"--to {to}: this decoder's key/value heads are merged by learned weights.",
            "Fold them first: growkit export --fold.",
        )


def _check_groups(shape: ModelShape, groups: int, *, merged_only: bool) -> None:
    """``groups`` has to divide the query heads and the source's heads, or be a multiple of these.

    ``merged_only`` excludes multiples.
    """
    heads, kv = shape.sizes["query_head"], shape.sizes["kv_head"]
    fitting = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (kv % n == 0 or (not merged_only and n % kv == 0))
    ]
    if groups not in fitting:
        raise UsageError(
            f"--kv-heads {groups}: a decoder of {heads} query heads on {kv} key/value heads cannot "
            "have so many.",
            f"Numbers that fit: {', '.join(map(str, fitting))}.",
        )


@dataclass(frozen=True)
class T5ToKvHeads:
    """The decoder to ``heads`` key/value heads; None: as many as query heads (plain T5).

    Attributes:
        merge: how several heads become one, ``mean`` or ``first``.
    """

    heads: int | None
    merge: str = "mean"

    def apply(self, shape: ModelShape) -> Effect:
        _refuse_weighted(shape, "gqa")
        if self.merge == "aligned":
            raise UsageError(
                "--merge aligned: T5's heads cannot be aligned yet.", "Use --merge mean or first."
            )
        kv = shape.sizes["kv_head"]
        groups = shape.sizes["query_head"] if self.heads is None else self.heads
        _check_groups(shape, groups, merged_only=False)
        config = _config(shape, groups)
        summary = f"the decoder's key/value heads {kv} -> {groups}"
        if groups >= kv:
            return Effect(
                config=config,
                summary=f"{summary} (repeated)",
                exactness=Exactness.BIT_EXACT,
                reason="every query head reads a copy of its own key/value head",
                # In T5's own layout the encoder's heads are on the axis kv_head too.
                axes={"kv_head": AxisMap.spread(kv, groups)},
                by_role=_encoder(shape, config),
            )
        heads = ToKvHeads(groups, self.merge)
        width = shape.sizes["head_dim"]
        return Effect(
            config=config,
            summary=f"{summary} ({self.merge} of each group)",
            exactness=Exactness.NOT_EXACT,
            reason="the heads of a group are merged into one (arXiv 2305.13245)",
            computed={
                role: merged(shape.family, role, kv // groups, width, heads)
                for role in DECODER_STATES
            },
            by_role=_encoder(shape, config),
            warnings=(UPTRAINING,),
        )


@dataclass(frozen=True)
class T5ToWgqa:
    """The decoder to ``groups`` merged key/value heads; None: as many as the source has.

    To as many groups as the source has it is exact: weights are 1, and the trained heads of a group
    share the source's. To fewer, the weights start at the mean pool (arXiv 2407.10855, section 3).
    """

    groups: int | None = None
    weights: str = "scalar"

    def apply(self, shape: ModelShape) -> Effect:
        _refuse_weighted(shape, "wgqa")
        heads, kv, dim = (shape.sizes[name] for name in ("query_head", "kv_head", "head_dim"))
        groups = kv if self.groups is None else self.groups
        if self.weights not in WEIGHTS:
            raise UsageError(
                f"--wgqa-weights {self.weights!r} is not known.",
                f"{nearest(self.weights, WEIGHTS)}Valid values: {', '.join(WEIGHTS)}.",
            )
        _check_groups(shape, groups, merged_only=True)
        fields = {"decoder_attention": "wgqa", "wgqa_weights": self.weights, "wgqa_init": "mean"}
        config = _config(shape, groups, **fields)
        tail = {"scalar": (), "column": (dim,), "row": (shape.sizes["hidden"],)}[self.weights]
        exact = groups == kv
        return Effect(
            config=config,
            summary=f"the decoder's {kv} key/value heads -> {heads} trained heads, merged to "
            f"{groups} by {self.weights} weights",
            exactness=Exactness.EXACT if exact else Exactness.NOT_EXACT,
            reason="the trained heads of a group add up to its head"
            if exact
            else "starts at the mean of the merged heads",
            by_role=_encoder(shape, config)
            | dict.fromkeys(
                DECODER_STATES,
                ({"query_head": Alias("kv_head")}, {"query_head": AxisMap.spread(kv, heads)}),
            ),
            computed={
                f"{block}_{name}_{self.weights}": constant_rows(
                    lambda: np.full((heads, *tail), groups / kv), like=f"{block}_q"
                )
                for block in ("decoder", "cross")
                for name in ("w_k", "w_v")
            },
            shared_rows=frozenset(DECODER_STATES),
            warnings=() if exact else (UPTRAINING,),
        )


@dataclass(frozen=True)
class T5Fold:
    """Weighted to plain grouped-query attention: W_g = sum_i w_i (.) W_i; with G = H plain T5."""

    format: str | None = None

    def apply(self, shape: ModelShape) -> Effect:
        if shape.family.name != "t5_wgqa":
            raise UsageError(
                f"A {shape.family.name} checkpoint cannot be folded: it is ordinary attention "
                "already.",
                "What folds of the T5 family: t5_wgqa (growkit convert --to wgqa).",
            )
        heads, groups = shape.sizes["query_head"], shape.sizes["kv_head"]
        config = _config(shape, groups)
        if self.format is not None and self.format != config["model_type"]:
            raise UsageError(
                f"--format {self.format!r} cannot hold this checkpoint.",
                f"Valid values: {config['model_type']}.",
            )
        kind = next(word for word in WEIGHTS if shape.sizes[f"{word}_weights"])
        return Effect(
            config=config,
            summary=f"the decoder's {heads} trained key/value heads merged to {groups} by their "
            f"{kind} weights",
            exactness=Exactness.ROUNDED,
            reason="the merge is linear in the projections",
            computed={
                role: merged_heads(shape, role, f"{role[:-1]}w_{role[-1]}_{kind}", kind)
                for role in DECODER_STATES
            },
            by_role=_encoder(shape, config),
        )


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "mha": lambda request: T5ToKvHeads(None),
    "gqa": lambda request: T5ToKvHeads(request.needed("kv_heads"), request.merge),
    "mqa": lambda request: T5ToKvHeads(1, request.merge),
    "wgqa": lambda request: T5ToWgqa(request.kv_heads, request.wgqa_weights),
    "plain": lambda request: T5Fold(request.format),
}
