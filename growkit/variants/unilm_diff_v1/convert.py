"""DIFF V1 as Microsoft's reference module stores it: the channels of a head, and what it can hold.

Its rotary encoding turns the pairs (2i, 2i + 1) of a query or key head, ours and DiffLlama's the
pairs (i, i + d / 2), both by the same angle. A score q . k is a sum over the channels of a head, so
these may change places together: channel order 0, 2, 4 ... 1, 3, 5 ... makes the one of the other.
Values are not rotated and keep their order.

The module has no options, so on the way back

* lambda_init is the one of the layer index: the lambda vectors keep lambda, the gain of the heads'
  norm takes (1 - before) / (1 - after);
* the norm's epsilon is 1e-5: with c = sqrt(1e-5 / before) on v_proj,
  c x / sqrt(c^2 mean(x^2) + 1e-5) = x / sqrt(mean(x^2) + before).

Source: microsoft/unilm, ``Diff-Transformer/multihead_flashdiff_1.py``.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from growkit.core.errors import UsageError
from growkit.families.lambda_schedule import lambda_init_schedule
from growkit.families.unit_layout import IntArray
from growkit.surgery.axis_map import AxisMap
from growkit.surgery.effect import Effect, Exactness, ModelShape, UnitMaps
from growkit.variants.unilm_diff_v1.family import NORM_EPS

UNILM = "unilm_diff_v1"


def reordered_channels(shape: ModelShape, to: str) -> dict[str, UnitMaps]:
    """Maps of the channels of query and key heads; empty where both formats pair them alike."""
    before, after, dim = shape.family.name == UNILM, to == UNILM, shape.sizes["head_dim"]
    if before == after:
        return {}
    order = halves_from_pairs(dim) if before else pairs_from_halves(dim)
    return dict.fromkeys(("q", "k"), ({}, {"head_dim": AxisMap(order, dim)}))


def halves_from_pairs(dim: int) -> IntArray:
    """Reference's channel of each of our channels: 0, 2, 4 ... 1, 3, 5 ..."""
    return np.arange(dim).reshape(-1, 2).T.reshape(-1)


def pairs_from_halves(dim: int) -> IntArray:
    """Our channel of each of the reference's channels: 0, d / 2, 1, d / 2 + 1 ..."""
    return np.arange(dim).reshape(2, -1).T.reshape(-1)


def to_unilm(shape: ModelShape, config: dict[str, Any]) -> Effect:
    """The checkpoint of ``config`` (our words for the source) in the reference's files.

    Raises:
        UsageError: it has what the module has not.
    """
    sizes, name = shape.sizes, shape.family.name
    maps = sizes["signal_head"] + sizes["noise_head"]
    objections = {
        "it does not normalise the output of a head (sub_layer_norm false)": not config[
            "sub_layer_norm"
        ],
        "its projections have biases": sizes["attention_bias"] or sizes["output_bias"],
        "its query and key heads are normalised (qk_norm)": sizes["qk_norm"],
        f"Microsoft's module derives head_dim from hidden_size, and {maps} heads of "
        f"{sizes['head_dim']} channels are not {sizes['hidden']}": maps * sizes["head_dim"]
        != sizes["hidden"],
    }
    for reason, holds in objections.items():
        if holds:
            raise UsageError(
                f"This {name} checkpoint cannot become {UNILM}: {reason}.",
                "--to gda and --to diff_v1 hold it.",
            )
    schedule = lambda_init_schedule(sizes["layer"])
    eps = float(config["attn_rms_norm_eps"])
    as_it_is = eps == NORM_EPS and config["lambda_init"] == schedule
    return Effect(
        config=config | {"lambda_init": schedule, "attn_rms_norm_eps": NORM_EPS},
        summary=f"{name} -> {UNILM}: the same weights, the channels of a head in rotary pairs "
        "(2i, 2i + 1)"
        + ("" if as_it_is else "; lambda_init and epsilon of the reference, folded into weights"),
        exactness=Exactness.EXACT if as_it_is else Exactness.ROUNDED,
        reason="a score is a sum over the channels of a head, whatever their order",
        factors={} if eps == NORM_EPS else {"v": sqrt(NORM_EPS / eps)},
        by_role=reordered_channels(shape, UNILM),
    )
