"""Which dense families have a twin with experts, and how a config of one becomes one of the other.

A twin has to compute the same attention, norms and embeddings, so that only the FFN changes: the
checks below are differences of the classes in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from growkit.families.base import Config, Family
from growkit.families.llama import LLAMA, MISTRAL
from growkit.families.mixtral import MIXTRAL
from growkit.families.phi3 import PHI3
from growkit.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

Objection = Callable[[Config], str | None]


def _no_biases(config: Config) -> str | None:
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            return f"the model has biases ({name}), and MixtralConfig has none"
    return None


def _one_window(config: Config) -> str | None:
    kinds = _layer_kinds(config)
    if len(kinds) > 1:
        return (
            "its layers differ (layer_types has full and sliding attention), and Qwen3MoeConfig "
            "has one attention window for all"
        )
    return None


def _plain_rotary(config: Config) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        return f"it rotates {part:g} of every head, and a Mixtral rotates heads whole"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        return (
            f"its rotary frequencies change with the length ({kind}), and only Phi-3's class fills "
            "the cache anew where generation gets there"
        )
    for name in ("resid_pdrop", "embd_pdrop"):
        if config.get(name):
            return f"it trains with {name} = {config[name]}, which a Mixtral has not"
    return None


def _windows_stated(config: Config) -> dict[str, Any]:
    """The two classes give windows to other layers where config.json has no list."""
    layers = QWEN2.sizes(config)["layer"]
    kinds = QWEN2.layer_list(config, "layer_types", layers) or []
    return {"layer_types": kinds} if "sliding_attention" in kinds else {}


def _layer_kinds(config: Config) -> set[str]:
    layers = QWEN3.sizes(config)["layer"]
    return set(QWEN3.layer_list(config, "layer_types", layers) or ())


def _window_of_all(config: Config) -> dict[str, Any]:
    return {"use_sliding_window": _layer_kinds(config) == {"sliding_attention"}}


@dataclass(frozen=True)
class Upcycling:
    """How a dense family becomes one with experts.

    Attributes:
        target: the family with experts.
        objection: why this config cannot become one, or None.
        assumed: what the dense class assumes where config.json is silent and the other class
            would assume something else.
        dropped: fields that mean nothing, or something else, to the other class.
        stated: fields of the other class beside sizes.
        adapted: fields that depend on the config.
        facts: sizes of the other family that the dense one does not have, beside the experts.
        shared: the other class has an expert that every token meets, in every layer with experts.
        fused: role of the other family -> (role of the matrix that holds it, axis -> part of its
            units), where the dense class has several matrices in one.
    """

    target: Family
    objection: Objection
    assumed: Mapping[str, Any]
    dropped: tuple[str, ...]
    stated: Mapping[str, Any]
    adapted: Callable[[Config], dict[str, Any]] = field(default=lambda config: {})
    facts: Mapping[str, int] = field(default_factory=dict)
    shared: bool = False
    fused: Mapping[str, tuple[str, Mapping[str, int]]] = field(default_factory=dict)

    def config(self, config: Config) -> dict[str, Any]:
        """The config in the other class's words, sizes left out."""
        kept = {name: value for name, value in config.items() if name not in self.dropped}
        result = {**self.assumed, **kept, **self.stated, **self.adapted(config)}
        rope = config.get("rope_parameters")
        if "rope_theta" not in config and not (isinstance(rope, dict) and "rope_theta" in rope):
            # Mixtral assumes 1e6 where the dense classes assume 1e4.
            if isinstance(rope, dict):
                result["rope_parameters"] = {**rope, "rope_theta": DENSE_THETA}
            else:
                result["rope_theta"] = DENSE_THETA
        return result


DENSE_THETA = 10_000.0
# A remote-code class would be of the dense model.
_FOREIGN = ("auto_map",)
_ROUTER = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "router_jitter_noise": 0.0,
    **_ROUTER,
}

UPCYCLINGS: dict[str, Upcycling] = {
    LLAMA.name: Upcycling(
        MIXTRAL,
        _no_biases,
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        # LlamaConfig ignores a window that stands in config.json; MixtralConfig would use it.
        ("attention_bias", "mlp_bias", "pretraining_tp", "sliding_window", *_FOREIGN),
        _MIXTRAL,
    ),
    MISTRAL.name: Upcycling(
        MIXTRAL,
        lambda config: None,
        {"rms_norm_eps": 1e-6, "sliding_window": 4096},
        _FOREIGN,
        _MIXTRAL,
    ),
    PHI3.name: Upcycling(
        MIXTRAL,
        _plain_rotary,
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        ("resid_pdrop", "embd_pdrop", *_FOREIGN),
        _MIXTRAL,
        fused={
            "q": ("qkv", {"query_head": 0}),
            "k": ("qkv", {"kv_head": 0}),
            "v": ("qkv", {"kv_head": 1}),
            "gate": ("gate_up", {"ffn": 0}),
            "up": ("gate_up", {"ffn": 1}),
        },
    ),
    QWEN2.name: Upcycling(
        QWEN2_MOE,
        lambda config: None,
        {},
        _FOREIGN,
        {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            "norm_topk_prob": True,
            **_ROUTER,
        },
        _windows_stated,
        {"expert_step": 1},
        shared=True,
    ),
    QWEN3.name: Upcycling(
        QWEN3_MOE,
        _one_window,
        {},
        ("layer_types", "max_window_layers", *_FOREIGN),
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "norm_topk_prob": True,
            **_ROUTER,
        },
        _window_of_all,
        {"expert_step": 1},
    ),
}

# Why a family that people ask for is in no row above: behind "holds a ... model with experts".
NO_TWIN: dict[str, str] = {
    "gemma": " (its norms multiply by 1 + w and its embedding by sqrt(hidden_size): a Mixtral "
    "would hold both as rounded numbers, and a Gemma 4 norms queries, keys and values)",
    "gemma2": " (it has norms behind each block and capped logits: Mixtral has neither, and a "
    "Gemma 4 norms queries, keys and values)",
    "gemma3": " (it has norms behind each block: Mixtral has none, and a Gemma 4 norms values)",
}
