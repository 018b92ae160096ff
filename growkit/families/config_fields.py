# SPDX-License-Identifier: Apache-2.0
"""What config.json may hold in the fields that growkit reads: types, and sizes that can be meant.

A size of 10^30, a million layers or a list where a number belongs is refused here, before anything
is computed from it or one entry a layer is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from growkit.core.errors import UsageError, shown

# One unit of an axis takes some 100 bytes in a plan. The largest published models have 262,144
# vocabulary entries (XLM-V: 901,629), an FFN of 53,248 and 126 layers.
MAX_SIZE = 2**20
MAX_LAYERS = 2**16
MAX_TENSORS = 500_000

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
    "d_model",
    "d_ff",
    "d_kv",
    "ffn_dim",
    "word_embed_proj_dim",
    "num_heads",
    "relative_attention_num_buckets",
    "no_rope_layer_interval",
)
_NUMBERS = (
    "rms_norm_eps",
    "attn_rms_norm_eps",
    "qk_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "initializer_range",
    "initializer_factor",
    "lambda_std",
    "partial_rotary_factor",
    "rotary_pct",
    "rope_theta",
    "max_window_layers",
    "sliding_window",
    "max_position_embeddings",
)
_LISTS = ("layer_types", "mlp_only_layers", "no_rope_layers", "lambda_init")
_MAPPINGS = ("rope_parameters", "rope_scaling")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    # False stands for "none" in some published configs.
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= 1e15


def _plain_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_LAYERS
        # a number that is not finite has its own message where the list is read
        and all(entry is None or isinstance(entry, str | int | float) for entry in value)
    )


def _rope(value: Any) -> bool:
    """One mapping of numbers and words, or one for each type of layer (Gemma 3)."""
    return isinstance(value, Mapping) and all(
        not isinstance(entry, int | float) or _number(entry)
        for part in (value, *(inner for inner in value.values() if isinstance(inner, Mapping)))
        for entry in part.values()
    )


_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_SIZES + _LAYERS, _whole, "Set {name} to a positive whole number."),  # some may be 0
    (_NUMBERS, _number, "Set {name} to a number."),
    (_LISTS, _plain_list, "{name} is a list with one plain value a layer."),
    (_MAPPINGS, _rope, "{name} is an object of numbers and words."),
)


def check_fields(
    config: Mapping[str, Any], more_sizes: tuple[str, ...] = (), *, by_layer: bool = False
) -> None:
    """Raise UsageError for a field of config.json that holds what no model has.

    A field that is absent or null is left to the family; ``more_sizes`` are those of variants.
    ``by_layer``: sizes may be lists that say the same of every layer (Gemma 3n).
    """

    def stated(name: str) -> Any:
        value = config.get(name)
        if by_layer and name in _SIZES and isinstance(value, list) and value:
            return value[0] if all(entry == value[0] for entry in value) else value
        return value

    for names, allowed, remedy in (*_RULES, (more_sizes, *_RULES[0][1:])):
        for name in names:
            value = stated(name)
            if value is not None and not allowed(value):
                raise UsageError(
                    f"config.json has {name} = {shown(value)}.", remedy.format(name=name)
                )
    for names, largest in ((_LAYERS, MAX_LAYERS), (_SIZES + more_sizes, MAX_SIZE)):
        for name in names:
            value = stated(name)
            if value is not None and value > largest:
                raise UsageError(
                    f"config.json has {name} = {value}.",
                    f"growkit reads models with at most {largest}: correct it.",
                )
