"""A tiny checkpoint, grown, for the tests of what training does to old and new slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from training_runs import recipe_values

from growkit.growing import grow_checkpoint
from growkit.record.manifest import read_manifest
from growkit.surgery.request import GrowthRequest
from growkit.training import train
from growkit.training.read_recipe import make_recipe
from growkit.training.recipe import Recipe

GDA = {
    "model_type": "gda", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_noise_heads": 1, "num_key_value_heads": 2, "head_dim": 8,
    "noise_keys": "own", "sub_layer_norm": True, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


def make_source(
    text: Path, folder: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A GDA model of two layers after three steps of training, stored in ``dtype``."""
    values = recipe_values(text, max_steps=3, schedule="constant", warmup_steps=0)
    values["model"]["config"] = {**GDA, **config}
    train(make_recipe(values), folder)
    if dtype != torch.float32:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def grow(source: Path, target: Path, **request: Any) -> Path:
    """Grow without verification (torch's verification is tested elsewhere)."""
    request = request or {"signal_heads": "x2", "ffn": "x1.5", "layers": "+1"}
    grow_checkpoint(source, target, GrowthRequest(**request), verify=False)
    return target


def continue_recipe(text: Path, grown: Path, **training: Any) -> Recipe:
    """Six steps from a grown folder, the learning rate high enough to move everything."""
    settings = {"max_steps": 6, "schedule": "constant", "warmup_steps": 0, **training}
    values = recipe_values(text, **settings)
    values["model"] = {"checkpoint": str(grown)}
    del values["tokenizer"]
    return make_recipe(values)


def new_mask(name: str, tensor: torch.Tensor, folder: Path) -> np.ndarray:
    """New entries by the manifest, one entry at a time: the oracle of growth/slots.py."""
    manifest = read_manifest(folder)
    assert manifest is not None
    part = manifest["new_parameters"].get(name, {})
    mask = np.zeros(tuple(tensor.shape), dtype=bool)
    if part == "all":
        mask[...] = True
        return mask
    for start, end in part.get("rows", []):
        mask[start:end] = True
    for start, end in part.get("columns", []):
        mask[:, start:end] = True
    return mask


def changed(before: Path, after: Path) -> dict[str, tuple[int, int]]:
    """Name -> how many old and new entries of a saved tensor differ in their bytes."""
    first = load_file(before / "model.safetensors")
    second = load_file(after / "model.safetensors")
    assert first.keys() == second.keys()
    counts = {}
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        integers = torch.int32 if tensor.dtype == torch.float32 else torch.int16
        differs = (tensor.view(integers) != second[name].view(integers)).numpy()
        mask = new_mask(name, tensor, before)
        counts[name] = (int((differs & ~mask).sum()), int((differs & mask).sum()))
    return counts
