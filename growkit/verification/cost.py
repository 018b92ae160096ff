"""What a window costs to compute, and whether that is affordable."""

from __future__ import annotations

from typing import Any

from growkit.verification.folder import Folder
from growkit.verification.inputs import depth
from growkit.verification.memory import available_memory

# About two minutes on two CPU cores.
AFFORDABLE_FLOPS = 1e13
MEMORY_SHARE = 0.25  # of what is available once the models are loaded


def window_flops(model: Any, folder: Folder, length: int) -> float:
    """Arithmetic of one forward pass over ``length`` tokens: every weight once a token, and every
    token's attention to all before it."""
    config = model.config.get_text_config(decoder=True)
    heads = int(getattr(config, "num_attention_heads", 1))
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    attention = 4 * depth(model) * heads * int(head_dim) * length**2
    return 2.0 * folder.parameters * length + attention


def window_bytes(model: Any, length: int, logits: int, itemsize: int) -> float:
    """Memory of a pass beside the weights: residual stream and feed-forward of the layer that runs,
    ``logits`` rows of the vocabulary, and attention maps where the class makes them."""
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    width = max(int(getattr(config, "intermediate_size", None) or 0), 4 * hidden)
    maps = 0
    if getattr(config, "_attn_implementation", "") == "eager":
        maps = 2 * int(config.num_attention_heads) * length**2
    elements = length * (8 * hidden + 3 * width) + logits * int(config.vocab_size) + maps
    return float(elements * itemsize)


def affordable(flops: float, size: float) -> bool:
    """At most ``AFFORDABLE_FLOPS``, and a quarter of the memory that is left."""
    available = available_memory()
    fits = available is None or size <= MEMORY_SHARE * available
    return flops <= AFFORDABLE_FLOPS and fits
