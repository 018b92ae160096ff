"""Configs of published models, as far as sizes go, give the published number of parameters."""

from __future__ import annotations

from typing import Any

import pytest

from growkit.families import family_of
from growkit.record.cost import cost_of


def sizes(
    model_type: str,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv: int,
    vocab: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        **more,
    }


TIED = {"tie_word_embeddings": True}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Mistral-7B-v0.1": (sizes("mistral", 4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "Qwen2.5-0.5B": (sizes("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED), 494_032_768),
    "Qwen3-0.6B": (
        sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED),
        596_049_920,
    ),
    "SmolLM3-3B": (sizes("smollm3", 2048, 11008, 36, 16, 4, 128256), 3_075_098_624),
    "Phi-3-mini-4k": (sizes("phi3", 3072, 8192, 32, 32, 32, 32064), 3_821_079_552),
    "OLMo-2-0425-1B": (sizes("olmo2", 2048, 8192, 16, 16, 16, 100352), 1_484_916_736),
    "gemma-2-2b": (sizes("gemma2", 2304, 9216, 26, 8, 4, 256000), 2_614_341_888),
    "gemma-3-1b-it": (sizes("gemma3_text", 1152, 6912, 26, 4, 1, 262144), 999_885_952),
}


EXPERTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "Mixtral-8x7B": (
        sizes("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
        12_879_925_248,
    ),
    "Qwen3-30B-A3B": (
        sizes(
            "qwen3_moe",
            2048,
            6144,
            48,
            32,
            4,
            151936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
        3_353_032_704,
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_parameter_count_of_experts(name: str) -> None:
    """12.9 and 3.3 billion parameters are active: the experts that a token does not meet idle."""
    config, parameters, active = EXPERTS[name]
    family = family_of(config)
    cost = cost_of(family, family.sizes(config), "BF16", 2048)
    assert (cost.parameters, cost.active_parameters) == (parameters, active)
    embedding = config["vocab_size"] * config["hidden_size"]
    attended = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * 128 * 1024
    assert cost.flops_per_token == 2 * (active - embedding) + attended


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name: str) -> None:
    config, parameters = PUBLISHED[name]
    family = family_of(config)
    assert cost_of(family, family.sizes(config), "BF16", 2048).parameters == parameters
