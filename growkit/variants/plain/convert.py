"""Fold a variant into ordinary grouped-query attention, which every engine serves.

* GDA without sub-layer norm and with shared keys is linear in its attention maps:
  y = sum_i W_i (A_i v - lambda A_j v), so a noise head j is an ordinary head with output weights
  -lambda times the sum of W_i over the signal heads of its group.
* GDA and DIFF V1 with keys of their own, and Shared DIFF, are linear too: ``fold_maps.py``.
* WGQA's merged keys and values are those of an ordinary model whose projections are the merged
  ones: W_g = sum_i w_i (.) W_i (arXiv 2407.10855).

Exact in real arithmetic; the new weights are rounded to the stored dtype. A norm over each head or
a lambda that depends on the token is not linear, and is refused with that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.checkpoint import Checkpoint
from growkit.core.errors import UsageError, nearest
from growkit.families import Family
from growkit.families.differential import LAMBDA_ROLES
from growkit.surgery.effect import Array, Computed, Effect, Exactness, ModelShape, Operator
from growkit.surgery.lambdas import lambda_value
from growkit.variants.catalogue import CATALOGUE, fold_of, variant_of
from growkit.variants.gda.family import CARRIED_FIELDS, stored_lambda_init
from growkit.variants.plain.maps import FoldedHeads, folded_tensors
from growkit.variants.request import ConversionRequest

QUERY_ROLES = ("q", "q_bias")


@dataclass(frozen=True)
class Fold:
    """To the config of ``format``: ``mistral``, ``qwen3`` or ``qwen2``; None: what holds it."""

    format: str | None = None

    def apply(self, shape: ModelShape) -> Effect:
        name = shape.family.name
        fold = fold_of(name)
        if fold is None:
            row = variant_of(name)
            reason = row.not_linear if row else ""
            folds = [row.folder for row in CATALOGUE if row.fold]
            raise UsageError(
                f"A {name} checkpoint cannot be folded: "
                f"{reason or 'it is ordinary attention already'}.",
                f"What folds: {', '.join(folds)} (without sub-layer norm).",
            )
        return fold(shape, _plain_config(shape, self.format))


def _plain_config(shape: ModelShape, asked: str | None) -> dict[str, Any]:
    """Config of an ordinary class with the source's norms and biases; head counts are missing."""
    bias, norm = (bool(shape.sizes.get(fact)) for fact in ("attention_bias", "qk_norm"))
    if shape.sizes.get("poly_norm"):
        raise UsageError(
            "This checkpoint's activation is poly_norm, which no ordinary class has.",
            "It cannot be folded.",
        )
    if shape.sizes.get("output_bias"):
        raise UsageError(
            "o_proj has a bias (attention_output_bias), which the ordinary classes have not.",
            "It cannot be folded.",
        )
    holding = [name for name, facts in FORMATS.items() if facts == (bias, norm)]
    if not holding:
        raise UsageError(
            "No ordinary class has both biases on q, k, v and norms of query and key heads.",
            "It cannot be folded.",
        )
    chosen = asked or holding[0]
    if chosen not in holding:
        raise UsageError(
            f"--format {chosen!r} cannot hold this checkpoint"
            + (" with its head norms." if norm else " with its biases." if bias else "."),
            f"{nearest(chosen, holding)}Valid values: {', '.join(holding)}.",
        )
    carried = {k: shape.config[k] for k in CARRIED_FIELDS if k in shape.config}
    dropped = ("attention_bias", "attention_output_bias", "qk_norm", "qk_norm_eps", "lambda_std")
    # 1e-6: what our classes assume for either.
    eps = shape.config.get("qk_norm_eps", 1e-6)
    if norm and eps != shape.config.get("rms_norm_eps", 1e-6):
        raise UsageError(
            f"The head norms have an epsilon of their own (qk_norm_eps = {eps}), which no ordinary "
            "class has.",
            "It cannot be folded.",
        )
    architecture = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[chosen]
    return {k: v for k, v in carried.items() if k not in dropped} | {
        "model_type": chosen,
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": shape.sizes["head_dim"],
        "sliding_window": None,
        **({} if chosen == "mistral" else {"use_sliding_window": False}),
        **({"attention_bias": False} if chosen == "qwen3" else {}),
    }


FORMATS: Mapping[str, tuple[bool, bool]] = {
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


def fold_differential(shape: ModelShape, config: dict[str, Any]) -> Effect:
    """Every map of a linear difference as a query head; ``config`` gets the head counts."""
    sizes = shape.sizes
    if sizes["sub_layer_norm"]:
        raise UsageError(
            "This checkpoint normalises the output of every head (sub_layer_norm), which is not "
            "linear in the attention maps.",
            "It cannot be folded; serve it with trust_remote_code.",
        )
    if shape.family.name == "gda" and sizes["parts"] == 1:
        return _fold_shared_keys(shape, config)
    heads = FoldedHeads.of(shape)
    query, kv = len(heads.query), len(heads.key)
    config |= {"num_attention_heads": query, "num_key_value_heads": kv}
    return Effect(
        config=config,
        summary=f"every map a query head: {query} on {kv} key/value heads, lambda folded into "
        "o_proj",
        exactness=Exactness.ROUNDED,
        reason="a subtracted map is a head with output weights -lambda W_O",
        axes=heads.axes(shape),
        computed=folded_tensors(shape, heads, lambda c, layer: _lambda(c, shape.family, layer)),
    )


def _fold_shared_keys(shape: ModelShape, config: dict[str, Any]) -> Effect:
    sizes = shape.sizes
    signal, noise = sizes["signal_head"], sizes["noise_head"]
    config |= {"num_attention_heads": signal + noise, "num_key_value_heads": sizes["kv_head"]}
    return Effect(
        config=config,
        summary=f"{signal} signal and {noise} noise heads -> {signal + noise} query heads, lambda "
        "folded into o_proj",
        exactness=Exactness.ROUNDED,
        reason="a noise head is a head with output weights -lambda W_O",
        computed={"o": _folded_output(shape)},
        # Stripes are the order that grouped-query attention reads.
        verbatim=frozenset(QUERY_ROLES),
    )


def _folded_output(shape: ModelShape) -> Computed:
    """o_proj [hidden, all heads x head_dim], stripes of (signal heads, noise heads)."""
    family, sizes = shape.family, shape.sizes
    groups = min(sizes["signal_head"], sizes["noise_head"])
    noise, width = sizes["noise_head"] // groups, sizes["value_dim"]
    signal = sizes["signal_head"] // groups
    output = family.tensor("o")
    assert output is not None

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        name = output.name.replace("{layer}", str(layer))
        value = _lambda(checkpoint, family, layer)
        block = _rows(checkpoint, name, first, count).reshape(count, groups, signal, width)
        subtracted = -value * block.sum(axis=2, keepdims=True)
        return np.concatenate([block, np.repeat(subtracted, noise, axis=2)], axis=2)

    return Computed(rows, ("o",))


def _lambda(checkpoint: Checkpoint, family: Family, layer: int) -> float:
    vectors = []
    for role in LAMBDA_ROLES:
        tensor = family.tensor(role)
        assert tensor is not None
        vectors.append(checkpoint.read(tensor.name.replace("{layer}", str(layer))))
    q1, k1, q2, k2 = vectors
    return lambda_value(q1, k1, q2, k2, stored_lambda_init(checkpoint.config, layer))


def _rows(checkpoint: Checkpoint, name: str, first: int, count: int) -> Array:
    """Rows of a matrix in float64."""
    return checkpoint.read_rows(name, first, count).astype(np.float64)


def fold_wgqa(shape: ModelShape, config: dict[str, Any]) -> Effect:
    """The merged heads written out; ``config`` gets the head counts."""
    sizes = shape.sizes
    kind = next(word for word in ("scalar", "column", "row") if sizes[f"{word}_weights"])
    roles = [role for role in ("k", "v", "k_bias", "v_bias") if shape.has(role)]
    config |= {
        "num_attention_heads": sizes["query_head"],
        "num_key_value_heads": sizes["kv_head"],
    }
    return Effect(
        config=config,
        summary=f"{sizes['query_head']} trained key/value heads merged to {sizes['kv_head']} by "
        f"their {kind} weights",
        exactness=Exactness.ROUNDED,
        reason="the merge is linear in the projections",
        computed={role: merged_heads(shape, role, f"w_{role[0]}_{kind}", kind) for role in roles},
    )


def merged_heads(shape: ModelShape, role: str, weights_role: str, kind: str) -> Computed:
    """Rows of a projection, or entries of a bias, whose heads WGQA's weights merge.

    Args:
        shape: the weighted model.
        role: of the projection or bias.
        weights_role: of its w_k or w_v.
        kind: what a weight multiplies.
    """
    sizes = shape.sizes
    dim, group = sizes["head_dim"], sizes["query_head"] // sizes["kv_head"]
    projection = shape.family.tensor(role)
    weights = shape.family.tensor(weights_role)
    assert projection is not None and weights is not None

    def rows(checkpoint: Checkpoint, layer: int, first: int, count: int) -> Array:
        names = (t.name.replace("{layer}", str(layer)) for t in (projection, weights))
        whole, w = (checkpoint.read(name).astype(np.float64) for name in names)
        heads = whole.reshape(-1, group, dim, whole.size // len(whole))  # [G, H/G, d, E or 1]
        if kind == "row":
            factors = w.reshape(-1, group, 1, w.shape[-1])
        else:
            factors = w.reshape(-1, group, w.size // len(w), 1)  # one number a head, or d
        merged: Array = (heads * factors).sum(axis=1).reshape(-1, heads.shape[-1])
        return merged[first : first + count]

    return Computed(rows, (role,))


TARGETS: Mapping[str, Callable[[ConversionRequest], Operator]] = {
    "plain": lambda request: Fold(request.format),
}
