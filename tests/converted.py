"""Tiny ordinary checkpoints, conversions of them, and what transformers computes on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from family_checkpoints import family_config, write_checkpoint
from growth_matrix import logits_of

from growkit.converting import convert_checkpoint
from growkit.surgery.plan import Plan
from growkit.variants.request import ConversionRequest
from growkit.verification.loading import register_own_models
from growkit.verification.tolerance import tolerance

Config = dict[str, Any]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
LAYERS = 2
# What the conversions have to hold: grouping, ties, biases on q, k, v, and norms of the heads.
SOURCES: dict[str, Config] = {
    "gqa": {"family": "llama"},
    "mha": {"family": "llama", "num_key_value_heads": 4},
    "mqa": {"family": "llama", "num_key_value_heads": 1},
    "tied": {"family": "llama", "tie_word_embeddings": True},
    "biases": {"family": "llama", "bias": True, "mlp_bias": False},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2", "use_sliding_window": False},
    "qwen3": {"family": "qwen3"},
}


def write_source(path: Path, name: str, dtype: str = "F32") -> Path:
    """One of ``SOURCES``: 4 query heads of 8 channels, 2 layers, random gains and biases."""
    register_own_models()
    fields = dict(SOURCES[name])
    config = family_config(
        fields.pop("family"), bias=fields.pop("bias", False), num_hidden_layers=LAYERS, **fields
    )
    return write_checkpoint(path, config, DTYPES[dtype])


def convert(source: Path, out: Path, to: str, **request: Any) -> Plan:
    """Convert without verification; ``threads`` and ``max_shard_size`` go to the writer."""
    writing = {"verify": False, "threads": 1}
    writing |= {k: request.pop(k) for k in ("threads", "max_shard_size", "verify") if k in request}
    plan, _ = convert_checkpoint(source, out, ConversionRequest(to=to, **request), **writing)
    return plan


def logits(folder: Path) -> torch.Tensor:
    """Logits [2, 40, vocab] in float32 through transformers; every weight has its place."""
    return logits_of(folder)[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |d logit|."""
    return float((a.double() - b.double()).abs().max())


def allowed(a: torch.Tensor, dtype: str = "F32", *, rounded: bool = False) -> float:
    """What rounding may do to logits ``a``."""
    rms = float(a.double().square().mean().sqrt())
    return tolerance(rms, LAYERS, torch.float32, storage=DTYPES[dtype], storage_rounding=rounded)
