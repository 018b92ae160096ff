"""Ordinary checkpoints -> a variant, trained a little -> `growkit export --fold`: both folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from family_checkpoints import family_config, write_checkpoint
from safetensors.torch import load_file, save_file

from growkit.cli.main import main

# 4 query heads, 2 key/value heads. Widths that vLLM's CPU kernels take: multiples of 32.
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 2}
# Name -> family that is converted, config fields, options of convert, class of the folded folder.
PAIRS: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "gda": ("llama", {}, ["--to", "gda", "--ratio", "2"], "mistral"),
    "gda with biases": (
        "qwen2",
        {"use_sliding_window": False},
        ["--to", "gda", "--ratio", "1"],
        "qwen2",
    ),
    "gda with head norms": ("qwen3", {}, ["--to", "gda", "--ratio", "2"], "qwen3"),
    "shared_diff": ("llama", {}, ["--to", "shared_diff", "--rank", "4"], "mistral"),
    "shared_diff with keys": (
        "llama",
        {},
        ["--to", "shared_diff", "--rank", "4", "--key-rank", "4"],
        "mistral",
    ),
    "wgqa": ("llama", {}, ["--to", "wgqa"], "mistral"),
    "wgqa of columns": (
        "qwen3",
        {},
        ["--to", "wgqa", "--wgqa-weights", "column"],
        "qwen3",
    ),
    "wgqa of rows": ("llama", {}, ["--to", "wgqa", "--wgqa-weights", "row"], "mistral"),
}


def write_pair(root: Path, name: str) -> tuple[Path, Path]:
    """Folders of the variant and of its fold.

    A conversion begins as the source: lambda 0, equal weights of a group, zero columns. What the
    variant adds is moved away from there, as training would, so that there is something to fold.
    """
    family, fields, options, _ = PAIRS[name]
    source = write_checkpoint(root / "source", family_config(family, **SIZES | fields))
    run("convert", source, *options, "--out", root / "variant")
    path = root / "variant/model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        if ".lambda_" in key or key.endswith((".w_k", ".w_v", "_up.weight", "o_proj.weight")):
            size = 0.1 if "o_proj" in key else 0.3
            tensor += size * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    run("export", root / "variant", "--fold", "--out", root / "folded")
    return root / "variant", root / "folded"


def run(*arguments: str | Path) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0
