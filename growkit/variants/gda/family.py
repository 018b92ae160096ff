"""Our own format: Grouped Differential Attention, Motif-2 layout or plain form.

Source: arXiv 2510.06949; layout of Motif-2-12.7B (arXiv 2511.07464). lambda_init stands in the
config, one value a layer, so that moving a layer never changes it.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.families import differential as diff
from growkit.families.base import Config, Family, LayerRule, produces, required
from growkit.families.decoder import (
    basic_fields,
    basic_sizes,
    gated_ffn_tensors,
    norm_tensors,
    outer_tensors,
)
from growkit.families.head_dim_rules import OUTPUT_NORM, HeadDimRule
from growkit.families.lambda_schedule import lambda_init_schedule
from growkit.families.unit_layout import Sizes, adjacent_parts, head_dim, stripes


def _sizes(config: Config) -> dict[str, int]:
    heads, noise = required(config, "num_attention_heads"), required(config, "num_noise_heads")
    dim, stored_kv = required(config, "head_dim"), required(config, "num_key_value_heads")
    keys = config.get("noise_keys", "own")
    if keys not in ("own", "shared"):
        raise UsageError(
            f"config.json has noise_keys = {keys!r}.", "Valid values: 'own' and 'shared'."
        )
    parts = 2 if keys == "own" else 1
    if stored_kv % parts:
        raise UsageError(
            f"config.json has num_key_value_heads = {stored_kv} with noise_keys = 'own'.",
            "Signal and noise keys come in pairs: use an even number.",
        )
    diff.check_head_counts(heads - noise, noise, stored_kv // parts)
    lambda_init_list(config)
    return basic_sizes(config) | {
        "signal_head": heads - noise,
        "noise_head": noise,
        "kv_head": stored_kv // parts,
        "parts": parts,
        "head_dim": dim,
        "value_dim": parts * dim,
        "sub_layer_norm": int(bool(config.get("sub_layer_norm", True))),
        "attention_bias": int(bool(config.get("attention_bias"))),
        "output_bias": int(bool(config.get("attention_output_bias"))),
        "qk_norm": int(bool(config.get("qk_norm"))),
        "poly_norm": int(config.get("hidden_act") == "poly_norm"),
    }


def _fields(sizes: Sizes) -> dict[str, Any]:
    return basic_fields(sizes) | {
        "num_attention_heads": sizes["signal_head"] + sizes["noise_head"],
        "num_noise_heads": sizes["noise_head"],
        "num_key_value_heads": sizes["parts"] * sizes["kv_head"],
        "head_dim": sizes["head_dim"],
    }


def stored_lambda_init(config: Config, layer: int) -> float:
    """lambda_init of a layer, from the config's list."""
    return float(lambda_init_list(config)[layer])


def lambda_init_list(config: Config) -> list[float]:
    """The config's list. Raises UsageError unless it has one entry a layer."""
    values = config.get("lambda_init")
    if not isinstance(values, list) or len(values) != config.get("num_hidden_layers"):
        raise UsageError(
            f"config.json has lambda_init = {values!r} for {config.get('num_hidden_layers')} "
            "layers.",
            "lambda_init is a list with one number a layer.",
        )
    return values


# A layer that is made from scratch gets what a model made from scratch gives its index.
FRESH_LAMBDA_INIT: dict[str, LayerRule] = {
    "lambda_init": lambda config, layers: list(lambda_init_schedule(layers))
}

pair_rows = produces(adjacent_parts("kv_head", lambda sizes: sizes["parts"], head_dim))
query_rows = produces(stripes("signal_head", "noise_head"))

CARRIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "initializer_range",
    "tie_word_embeddings",
    "attention_bias",
    "attention_output_bias",
    "qk_norm",
    "qk_norm_eps",
    "lambda_std",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "dtype",
    "torch_dtype",
)


# What a format's own class assumes where config.json is silent and ours assumes otherwise.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "diffllama": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
}


def config_from(config: Config, family: Family, sizes: Sizes) -> dict[str, Any]:
    """Our config for a checkpoint of another differential format (DiffLlama, Motif, DIFF V1)."""
    assert family.lambda_init is not None
    activation = config.get("hidden_act")
    if activation not in (None, "silu", "poly_norm"):
        raise UsageError(
            f"config.json has hidden_act = {activation!r}, which the gda format cannot hold.",
            "Grow it by options that the source's own format can hold (--layers, --ffn, --hidden).",
        )
    stated = {**CLASS_DEFAULTS.get(family.name, {}), **config}
    carried = {name: stated[name] for name in CARRIED_FIELDS if name in stated}
    # DiffLlama's per-head norm takes the eps of its other norms.
    norm_eps = stated["rms_norm_eps"] if family.name == "diffllama" else None
    norm_eps = stated.get("attn_rms_norm_eps", norm_eps)
    return (
        carried
        | _fields(sizes)
        | {
            "model_type": "gda",
            "architectures": ["GdaForCausalLM"],
            "noise_keys": "own",
            "sub_layer_norm": config.get("sub_layer_norm") is not False,
            "attn_rms_norm_eps": 1e-5 if norm_eps is None else norm_eps,
            "hidden_act": "poly_norm" if sizes["poly_norm"] else "silu",
            "lambda_init": [family.lambda_init(config, i) for i in range(sizes["layer"])],
        }
    )


GDA = Family(
    name="gda",
    model_types=("gda",),
    tensors=(
        *outer_tensors(),
        *norm_tensors(),
        *diff.attention_tensors(query_rows, pair_rows, pair_rows),
        diff.subln_tensor(),
        *gated_ffn_tensors(),
        *diff.polynorm_tensors(),
    ),
    links=diff.LINKS,
    sizes=_sizes,
    config_fields=_fields,
    kv_elements=lambda sizes: 2 * sizes["parts"] * sizes["kv_head"] * sizes["head_dim"],
    attention_flops=diff.attention_flops,
    head_dim=HeadDimRule(OUTPUT_NORM),
    per_layer_fields=("lambda_init", "layer_types"),
    fresh_entries=FRESH_LAMBDA_INIT,
    lambda_init=stored_lambda_init,
    full_copies_only=diff.polynorm_needs_whole_copies,
    adopt=config_from,
    adopted_facts=lambda config: {"sub_layer_norm": int(config.get("sub_layer_norm") is not False)},
)
