"""DIFF V1 in the files of Microsoft's reference module (see attention.py).

The release has a module and no config.json; the folder that holds such weights says so by
``"model_type": "growkit", "attention": "unilm_diff_v1"``. Tensors and sizes are those of
``diff_v1``, but for the name of the output projection, and for the order of the channels in a query
or key head, which a table of heads does not see: a conversion has to permute them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from growkit.core.errors import UsageError
from growkit.families.base import Config, layer_count
from growkit.families.lambda_schedule import (
    diff_lambda_init,
    follows_schedule,
    lambda_init_schedule,
)
from growkit.families.unit_layout import Sizes
from growkit.variants.diff_v1.family import DIFF_V1

NORM_EPS = 1e-5


def _sizes(config: Config) -> dict[str, int]:
    layers = layer_count(config)
    stated = config.get("lambda_init") or lambda_init_schedule(layers)
    sizes = DIFF_V1.sizes({**config, "lambda_init": stated})
    objections = {
        "lambda_init that does not follow the layer index": not follows_schedule(stated, layers),
        "no norm of the heads": not sizes["sub_layer_norm"],
        f"attn_rms_norm_eps other than {NORM_EPS}": config.get("attn_rms_norm_eps", NORM_EPS)
        != NORM_EPS,
        "biases": sizes["attention_bias"] or sizes["output_bias"],
        "norms of query and key heads": sizes["qk_norm"],
    }
    for what, holds in objections.items():
        if holds:
            raise UsageError(
                f"config.json says {what}, which Microsoft's module does not have.",
                "Correct it, or convert the checkpoint to diff_v1, which has the choice.",
            )
    if refusal := _refusal(config, sizes):
        raise UsageError(f"{refusal[0].upper()}{refusal[1:]}.", "Correct config.json.")
    return sizes


def _fields(sizes: Sizes) -> dict[str, Any]:
    return DIFF_V1.config_fields(sizes) | {"lambda_init": lambda_init_schedule(sizes["layer"])}


def _refusal(config: Config, sizes: Sizes) -> str | None:
    maps, dim = sizes["signal_head"] + sizes["noise_head"], sizes["head_dim"]
    if sizes["signal_head"] != sizes["noise_head"]:
        return "unilm_diff_v1 holds as many signal as noise heads (convert to diff_v1 first)"
    if maps * dim != sizes["hidden"]:
        return (
            f"in Microsoft's module {maps} heads of {dim} channels make up the hidden size, which "
            f"is {sizes['hidden']} (convert to diff_v1 first)"
        )
    return None


UNILM_DIFF_V1 = replace(
    DIFF_V1,
    name="unilm_diff_v1",
    attention="unilm_diff_v1",
    tensors=tuple(
        replace(tensor, name=tensor.name.replace("o_proj", "out_proj"))
        for tensor in DIFF_V1.tensors
    ),
    sizes=_sizes,
    config_fields=_fields,
    per_layer_fields=("layer_types",),
    refusal=_refusal,
    wider=None,
    lambda_init=lambda config, layer: diff_lambda_init(layer),
    lambda_scale_role="subln",
)
