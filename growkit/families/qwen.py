"""Qwen2 and Qwen3: Llama with biases on q, k and v (2), or a norm in every query and key head (3);
and both with experts, Qwen2 with one more that every token meets.

Source: transformers ``models/{qwen2,qwen3,qwen2_moe,qwen3_moe}`` (5.23).
"""

from __future__ import annotations

from typing import Any

from growkit.families.base import Config, Dim, Tensor, always, consumes, produces, required
from growkit.families.decoder import (
    LAYER,
    attention_tensors,
    decoder,
    gated_ffn_tensors,
    head_fields,
    head_norm_tensors,
    hidden_in,
    hidden_out,
    norm_shared_with_heads,
    norm_tensors,
    outer_tensors,
    sizes_with,
)
from growkit.families.expert_tensors import (
    aligned,
    expert_sizes,
    expert_tensors,
    has_experts,
    is_dense,
    stored_layout,
)
from growkit.families.head_dim_rules import HEAD_NORM, HeadDimRule
from growkit.families.unit_layout import Sizes, constant, plain


def _layer_types(config: Config, layers: int) -> list[str]:
    """The class's rule: full attention in the first ``max_window_layers``, then windows."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    return [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(layers)
    ]


QWEN2 = decoder(
    "qwen2",
    (*outer_tensors(), *norm_tensors(), *attention_tensors(), *gated_ffn_tensors()),
    sizes_with({"num_key_value_heads": 32}, {"attention_bias": 1, "output_bias": 0, "mlp_bias": 0}),
    layer_rules={"layer_types": _layer_types},
    layer_counts=("max_window_layers",),
)
QWEN3 = decoder(
    "qwen3",
    (
        *outer_tensors(),
        *norm_tensors(),
        *attention_tensors(),
        *head_norm_tensors(),
        *gated_ffn_tensors(),
    ),
    sizes_with({"num_key_value_heads": 32, "head_dim": 128}, {"mlp_bias": 0}),
    norm=norm_shared_with_heads(),
    head_dim=HeadDimRule(HEAD_NORM),
    layer_rules={"layer_types": _layer_types},
    layer_counts=("max_window_layers",),
)


def _layer_types_of_moe(config: Config, layers: int) -> list[str]:
    """The rule of Qwen2MoeConfig: windows in every other one of the first layers."""
    last = config.get("max_window_layers", 28) if config.get("use_sliding_window") else 0
    return [
        "sliding_attention" if layer < last and layer % 2 == 0 else "full_attention"
        for layer in range(layers)
    ]


DEFAULTS = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
}
_decoder_sizes = sizes_with(DEFAULTS, {"mlp_bias": 0})


DEFAULTS_2 = {
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "decoder_sparse_step": 1,
}
_decoder_sizes_2 = sizes_with(DEFAULTS_2, {"attention_bias": 1, "output_bias": 0, "mlp_bias": 0})


def _sizes(config: Config) -> dict[str, int]:
    # transformers 5 writes num_local_experts, everybody else num_experts.
    experts = {"num_experts": config.get("num_local_experts", 128)}
    return _with_experts(_decoder_sizes(config), {**DEFAULTS, **experts, **config})


def _sizes_2(config: Config) -> dict[str, int]:
    stated = {**DEFAULTS_2, **config}
    sizes = _with_experts(_decoder_sizes_2(config), stated)
    sizes["attention_bias"] = int(stated.get("qkv_bias", True))
    sizes["ffn_shared"] = required(stated, "shared_expert_intermediate_size")
    return sizes


def _with_experts(sizes: dict[str, int], stated: Config) -> dict[str, int]:
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


def _fields_2(sizes: Sizes) -> dict[str, Any]:
    return _fields(sizes) | {"shared_expert_intermediate_size": sizes["ffn_shared"]}


def _mixed(sizes: Sizes) -> bool:
    return "dense_ffn" in sizes


def _dense_tensors() -> tuple[Tensor, ...]:
    rows, columns = produces(plain("dense_ffn")), consumes(plain("dense_ffn"))
    return (
        Tensor("dense_gate", _named("gate"), (rows, hidden_in), _mixed, layers=is_dense),
        Tensor("dense_up", _named("up"), (rows, hidden_in), _mixed, layers=is_dense),
        Tensor("dense_down", _named("down"), (hidden_out, columns), _mixed, True, layers=is_dense),
    )


def _shared_tensors() -> tuple[Tensor, ...]:
    """The expert that every token meets, and its gate [1, hidden] in front of a sigmoid."""
    rows, columns = produces(plain("ffn_shared")), consumes(plain("ffn_shared"))
    place = f"{LAYER}mlp.shared_expert"

    def tensor(role: str, name: str, dims: tuple[Dim, Dim], writes: bool = False) -> Tensor:
        init = "zeros" if role == "shared_route" else "normal"
        return Tensor(role, place + name, dims, always, writes, init, layers=has_experts)

    return (
        tensor("shared_gate", ".gate_proj.weight", (rows, hidden_in)),
        tensor("shared_up", ".up_proj.weight", (rows, hidden_in)),
        tensor("shared_down", ".down_proj.weight", (hidden_out, columns), True),
        tensor("shared_route", "_gate.weight", (produces(constant(1)), hidden_in)),
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
QWEN2_MOE = decoder(
    "qwen2_moe",
    (
        *outer_tensors(),
        *norm_tensors(),
        *attention_tensors(),
        *expert_tensors("mlp.gate.weight", "mlp.experts"),
        *_shared_tensors(),
        *_dense_tensors(),
    ),
    _sizes_2,
    config_fields=_fields_2,
    layer_rules={"layer_types": _layer_types_of_moe},
    refusal=aligned("qwen2_moe", "moe_intermediate_size"),
    stored_facts=stored_layout,
)
