"""Tiny random checkpoints of ordinary families, written by transformers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

Config = dict[str, Any]

SIZES: Config = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What each family has beside the common sizes. Windows are shorter than the verified text, so that
# a layer of the wrong kind shows.
FAMILIES: dict[str, Config] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 16},
    "smollm3": {"model_type": "smollm3"},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 16},
    "gemma2": {"model_type": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 3},
}
# Config fields that give a family biases.
BIASES: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "granite": ("attention_bias", "mlp_bias"),
    "smollm3": ("attention_bias", "mlp_bias"),
    "qwen3": ("attention_bias",),
    "qwen3_moe": ("attention_bias",),
    "olmo2": ("attention_bias",),
    "olmo3": ("attention_bias",),
    "gemma2": ("attention_bias",),
    "gemma3": ("attention_bias",),
}


# LayerNorm families have heads that fill the hidden size, so what fits them is asked for by itself.
LAYER_NORM_SIZES: Config = {
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LAYER_NORM_FAMILIES: dict[str, Config] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 24,
        "n_positions": 128,
        "initializer_range": 0.12,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
        "rotary_pct": 0.5,
        "initializer_range": 0.12,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 24,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "init_std": 0.12,
    },
}


def layer_norm_config(family: str, **changes: Any) -> Config:
    """Config of a tiny model of a LayerNorm family."""
    return LAYER_NORM_SIZES | LAYER_NORM_FAMILIES[family] | changes


# The classes with experts run only widths that are multiples of 16 bytes.
EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral")


def fitting(family: str, request: dict[str, Any]) -> dict[str, Any]:
    """The request, with an FFN that the family can run."""
    if family == "qwen2_moe" and str(request.get("ffn", "")).startswith("+"):
        return request | {"ffn": "x2"}  # a number of units fits not both: experts, shared expert
    odd = family in EXPERTS and str(request.get("ffn", "")) in ("+7", "+9")
    return request | {"ffn": "+8"} if odd else request


def family_config(family: str, *, bias: bool = False, **changes: Any) -> Config:
    """Config of a tiny model of this family."""
    biases = dict.fromkeys(BIASES.get(family, ()), bias)
    return SIZES | FAMILIES[family] | biases | changes


def class_config(config: Config) -> PreTrainedConfig:
    """The config as transformers has it."""
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def write_checkpoint(
    path: Path,
    config: Config,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    fused: bool = False,
) -> Path:
    """A folder with random gains and biases too, so that a mistake in either shows.

    ``fused`` writes the experts of a layer in two tensors.
    """

    def save(folder: Path) -> None:
        model = AutoModelForCausalLM.from_config(class_config(config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name or ".ln_" in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
                else:
                    parameter.copy_(0.12 * torch.randn(parameter.shape, generator=generator))
        model.to(dtype).save_pretrained(folder, save_original_format=not fused)

    return _saved_once(path, repr((config, dtype, seed, fused)), save)


_saved: dict[str, Path] = {}
_folder = tempfile.TemporaryDirectory(prefix="growkit-families-")


def _saved_once(path: Path, key: str, save: Callable[[Path], None]) -> Path:
    """``path``, a copy of the folder of this key, which ``save`` writes the first time."""
    if key not in _saved:
        _saved[key] = Path(_folder.name, str(len(_saved)))
        save(_saved[key])
    shutil.copytree(_saved[key], path, dirs_exist_ok=True)
    return path


# -- encoder-decoders ------------------------------------------------------------------------------

T5_SIZES: Config = {
    "model_type": "t5",
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
# Generation of T5 -> config fields, and whether it stores an output projection of its own.
T5_KINDS: dict[str, tuple[Config, bool]] = {
    "v1.0": ({}, False),
    "v1.1": ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    "untied scaled": ({}, True),
    "tied unscaled": ({"tie_word_embeddings": False}, False),
}


def write_t5(
    path: Path,
    kind: str = "v1.0",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A folder of an encoder-decoder with random gains and position biases too."""
    fields, own_head = T5_KINDS[kind]
    sizes = T5_SIZES | fields | changes

    def save(folder: Path) -> None:
        model = AutoModelForSeq2SeqLM.from_config(class_config(sizes))
        if own_head:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    parameter += 0.3 * noise
                else:
                    # Nothing else scales the scores, to which position biases are added as they
                    # are.
                    scale = 12**-0.5 if name.endswith(".q.weight") else 1.0
                    parameter.copy_((1.0 if "bias" in name else 0.2 * scale) * noise)
        model.to(dtype).save_pretrained(folder)

    return _saved_once(path, repr((kind, sizes, dtype, seed)), save)
