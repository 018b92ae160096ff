"""What a comparison costs, in memory and FLOPs, and what is there for it.

How much memory there is, and whether two models fit.

What a window costs to compute, and whether that is affordable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from growkit.verification.model_inputs import depth, largest_number
from growkit.verification.written_folder import Folder

SHARE = 0.6  # of the available memory; the rest is for activations, logits and page cache


def available_memory() -> int | None:
    """Bytes that this process may still use (the control group's limit included), or None."""
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def both_fit(a: Folder, b: Folder, dtype: torch.dtype, available: int | None = None) -> bool:
    """Both models in ``dtype`` need at most 60 % of the available memory; True when unknown."""
    available = available_memory() if available is None else available
    needed = (a.parameters + b.parameters) * dtype.itemsize
    return available is None or needed <= SHARE * available


# About two minutes on two CPU cores.
AFFORDABLE_FLOPS = 1e13
MEMORY_SHARE = 0.25  # of what is available once the models are loaded


def window_flops(model: Any, folder: Folder, length: int) -> float:
    """Arithmetic of one forward pass over ``length`` tokens: every weight once a token, and every
    token's attention to all before it."""
    config = model.config.get_text_config(decoder=True)
    heads = largest_number(config, "num_attention_heads", 1)
    head_dim = largest_number(config, "head_dim") or int(config.hidden_size) // heads
    attention = 4 * depth(model) * heads * head_dim * length**2
    return 2.0 * folder.parameters * length + attention


def window_bytes(model: Any, length: int, logits: int, itemsize: int) -> float:
    """Memory of a pass beside the weights: residual stream and feed-forward of the layer that runs,
    ``logits`` rows of the vocabulary, and attention maps where the class makes them."""
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    width = max(largest_number(config, "intermediate_size"), 4 * hidden)
    maps = 0
    if getattr(config, "_attn_implementation", "") == "eager":
        maps = 2 * largest_number(config, "num_attention_heads", 1) * length**2
    elements = length * (8 * hidden + 3 * width) + logits * int(config.vocab_size) + maps
    return float(elements * itemsize)


def affordable(flops: float, size: float) -> bool:
    """At most ``AFFORDABLE_FLOPS``, and a quarter of the memory that is left."""
    available = available_memory()
    fits = available is None or size <= MEMORY_SHARE * available
    return flops <= AFFORDABLE_FLOPS and fits
