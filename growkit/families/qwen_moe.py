"""Qwen3-MoE: Qwen3 with experts in the place of the FFN of some layers, usually all.

Source: transformers ``models/qwen3_moe`` (5.23). A layer has experts unless ``mlp_only_layers``
lists it or ``decoder_sparse_step`` does not divide its number (from 1). The axis ``ffn`` is the
width of an expert (``moe_intermediate_size``), so that it is the width that growth by role finds
in a dense Qwen3; the width of the dense layers is ``dense_ffn``.
"""

from __future__ import annotations

from typing import Any

from growkit.families.base import Config, Tensor, consumes, produces, required
from growkit.families.decoder import (
    LAYER,
    attention_tensors,
    decoder,
    head_fields,
    head_norm_tensors,
    hidden_in,
    hidden_out,
    norm_shared_with_heads,
    norm_tensors,
    outer_tensors,
    sizes_with,
)
from growkit.families.experts import (
    aligned,
    expert_sizes,
    expert_tensors,
    has_experts,
    is_dense,
    stored_layout,
)
from growkit.families.head_dim import HEAD_NORM, HeadDimRule
from growkit.families.layout import Sizes, plain

DEFAULTS = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
}
_decoder_sizes = sizes_with(DEFAULTS, {"mlp_bias": 0})


def _sizes(config: Config) -> dict[str, int]:
    # transformers 5 writes num_local_experts, everybody else num_experts.
    experts = {"num_experts": config.get("num_local_experts", 128)}
    stated = {**DEFAULTS, **experts, **config}
    sizes = _decoder_sizes(config)
    layers, step = sizes["layer"], required(stated, "decoder_sparse_step")
    excepted = frozenset(stated.get("mlp_only_layers") or ())
    sparse = [i for i in range(layers) if i not in excepted and not (i + 1) % step]
    sizes |= expert_sizes(stated, "num_experts", layers)
    sizes |= {"expert_layers": sum(1 << i for i in sparse), "expert_step": step}
    if len(sparse) < layers:
        sizes["dense_ffn"] = sizes["ffn"]
    sizes["ffn"] = required(stated, "moe_intermediate_size")
    return sizes


def _fields(sizes: Sizes) -> dict[str, Any]:
    sparse = [i for i in range(sizes["layer"]) if has_experts(sizes, i)]
    step = sizes["expert_step"]
    fields = head_fields(sizes) | {
        "moe_intermediate_size": sizes["ffn"],
        "num_experts": sizes["expert"],
        "num_experts_per_tok": sizes["active_expert"],
        "decoder_sparse_step": step,
        "mlp_only_layers": [
            i for i in range(sizes["layer"]) if not (i + 1) % step and i not in sparse
        ],
    }
    del fields["intermediate_size"]
    if "dense_ffn" in sizes:
        fields["intermediate_size"] = sizes["dense_ffn"]
    return fields


def _mixed(sizes: Sizes) -> bool:
    return "dense_ffn" in sizes


def _dense_tensors() -> tuple[Tensor, ...]:
    rows, columns = produces(plain("dense_ffn")), consumes(plain("dense_ffn"))
    return (
        Tensor("dense_gate", _named("gate"), (rows, hidden_in), _mixed, layers=is_dense),
        Tensor("dense_up", _named("up"), (rows, hidden_in), _mixed, layers=is_dense),
        Tensor("dense_down", _named("down"), (hidden_out, columns), _mixed, True, layers=is_dense),
    )


def _named(matrix: str) -> str:
    return f"{LAYER}mlp.{matrix}_proj.weight"


QWEN3_MOE = decoder(
    "qwen3_moe",
    (
        *outer_tensors(),
        *norm_tensors(),
        *attention_tensors(),
        *head_norm_tensors(),
        *expert_tensors("mlp.gate.weight", "mlp.experts"),
        *_dense_tensors(),
    ),
    _sizes,
    config_fields=_fields,
    norm=norm_shared_with_heads(),
    head_dim=HeadDimRule(HEAD_NORM),
    refusal=aligned("qwen3_moe", "moe_intermediate_size"),
    stored_facts=stored_layout,
    spellings={"num_experts": "num_local_experts"},
)
