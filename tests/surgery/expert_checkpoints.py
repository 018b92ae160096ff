"""Tiny checkpoints with experts, dense ones to make them of, and their folders changed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints as tiny
import torch
from family_checkpoints import family_config, write_checkpoint

from growkit.verification import VerificationReport, verify_checkpoints

LAYOUTS = ("separate", "fused")
# Two layers: enough for one with experts and one without.
TWO = {"num_hidden_layers": 2}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", TWO),
    "qwen3_moe": ("qwen3_moe", TWO),
    "qwen3_moe, probabilities as they are": ("qwen3_moe", TWO | {"norm_topk_prob": False}),
    "qwen3_moe, one dense layer": ("qwen3_moe", TWO | {"mlp_only_layers": [0]}),
    "qwen3_moe, every second layer": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
    ),
}
DENSE = ("llama", "mistral", "qwen3")


def source_folder(
    path: Path, name: str, layout: str = "separate", dtype: torch.dtype = torch.float32
) -> Path:
    """A checkpoint of ``SOURCES``, or a dense one by the name of its family."""
    family, changes = SOURCES.get(name, (name, TWO))
    return write_checkpoint(path, family_config(family, **changes), dtype, fused=layout == "fused")


def verified(a: Path, b: Path) -> VerificationReport:
    return verify_checkpoints(a, b, tokens=64, window=32, generate_tokens=4)


def changed(
    folder: Path, change: Callable[[tiny.Tensors], None] = lambda tensors: None, **config: Any
) -> Path:
    """A copy of a grown folder with tensors changed in place, or fields of its config."""
    tensors, out = tiny.read_folder(folder), folder.with_name(folder.name + "-changed")
    change(tensors)
    tiny.write_folder(out, tiny.read_config(folder) | config, tensors)
    (out / "growkit.json").write_text((folder / "growkit.json").read_text())
    return out


def separate_names(config: tiny.Config) -> tuple[str, dict[str, str]]:
    """(what stands in front of an expert's number, gate/up/down -> its matrix)."""
    if config["model_type"] == "mixtral":
        return "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    return "mlp", {part: f"{part}_proj" for part in ("gate", "up", "down")}


def unstacked(tensors: tiny.Tensors, config: tiny.Config) -> tiny.Tensors:
    """The same tensors with every expert's in its own, under the names of that layout."""
    place, parts = separate_names(config)
    result: tiny.Tensors = {}
    for name, array in tensors.items():
        layer = name.split(".mlp.")[0]
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, matrix in enumerate(array):
                gate, up = np.split(matrix, 2)
                at = f"{layer}.{place}.experts.{expert}."
                result[f"{at}{parts['gate']}.weight"] = gate
                result[f"{at}{parts['up']}.weight"] = up
        elif name.endswith("mlp.experts.down_proj"):
            for expert, matrix in enumerate(array):
                result[f"{layer}.{place}.experts.{expert}.{parts['down']}.weight"] = matrix
        elif name.endswith("mlp.gate.weight"):
            result[f"{layer}.{place}.gate.weight"] = array
        else:
            result[name] = array
    return result


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "growkit.json").read_text())
    return content
