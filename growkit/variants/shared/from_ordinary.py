"""What may become one of our decoders: ordinary softmax attention in a Llama-shaped model.

Our classes have RMSNorm in front of both blocks, rotary encoding of whole heads, a gated FFN
and, as options, biases on q, k, v (and o) and a norm in every query and key head.
"""

from __future__ import annotations

from typing import Any

from growkit.core.errors import UsageError
from growkit.surgery.effect import ModelShape
from growkit.variants.gda.family import CARRIED_FIELDS

# Families whose layers our decoder can hold, with what their classes assume where config.json is
# silent and ours assumes otherwise (transformers 5.23).
HOLDABLE: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}


def check_ordinary(shape: ModelShape) -> None:
    """Raise UsageError unless the source's attention is plain softmax attention that we can hold.

    The remedy names the families, or the option of the config that stands in the way.
    """
    family = shape.family.name
    if family not in HOLDABLE:
        raise UsageError(
            f"A {family} checkpoint cannot be converted to another attention.",
            f"Families that can: {', '.join(HOLDABLE)}.",
        )
    objections = {
        "its layers attend in windows (layer_types, sliding_window)": _windows(shape),
        "its FFN has biases (mlp_bias)": shape.sizes.get("mlp_bias"),
        f"its activation is {shape.config.get('hidden_act')!r}": shape.config.get(
            "hidden_act", "silu"
        )
        != "silu",
    }
    for reason, holds in objections.items():
        if holds:
            raise UsageError(
                f"This {family} checkpoint cannot be converted: {reason}.",
                "Our decoder has full attention, no FFN biases and silu.",
            )


def _windows(shape: ModelShape) -> bool:
    kinds = shape.family.layer_list(shape.config, "layer_types", shape.sizes["layer"])
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    # MistralConfig has no layer_types: its one window holds for all layers.
    window = shape.config.get("sliding_window", 4096 if shape.family.name == "mistral" else None)
    longest = shape.config.get("max_position_embeddings", 131072)
    return shape.family.name == "mistral" and window is not None and window < longest


def decoder_fields(shape: ModelShape) -> dict[str, Any]:
    """Config fields of our decoders that the attention has no say in."""
    stated = {**HOLDABLE[shape.family.name], **shape.config}
    if shape.family.tensor("q_norm") is not None:
        # The source's norms share one epsilon. Ours have two, so that padding the hidden size,
        # which rescales rms_norm_eps, leaves the heads alone.
        stated["qk_norm_eps"] = stated["rms_norm_eps"]
    return {name: stated[name] for name in CARRIED_FIELDS if name in stated} | {
        "hidden_act": "silu",
        "head_dim": shape.sizes["head_dim"],
        "attention_bias": bool(shape.sizes["attention_bias"]),
        "attention_output_bias": bool(shape.sizes["output_bias"]),
        "qk_norm": shape.family.tensor("q_norm") is not None,
    }


def growkit_fields(shape: ModelShape, attention: str) -> dict[str, Any]:
    """Config of our causal LM with one of the variants; head counts are the variant's."""
    return decoder_fields(shape) | {
        "model_type": "growkit",
        "architectures": ["GrowkitForCausalLM"],
        "attention": attention,
    }
