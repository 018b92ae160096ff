# SPDX-License-Identifier: Apache-2.0
"""How evenly the routers of a mixture use its experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from growkit.verification.routing import routers


@contextlib.contextmanager
def choices(model: Any) -> Iterator[dict[int, Tensor]]:
    """While open: layer -> how often each of its experts was chosen, int64 [experts]."""
    counts: dict[int, Tensor] = {}

    def count(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not (isinstance(output, tuple) and len(output) == 3):
                return  # a router of a class that says it in another way
            logits, _, chosen = output
            if logits.ndim != 2 or chosen.is_floating_point():
                return
            found = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
            counts[layer] = counts[layer] + found if layer in counts else found

        return hook

    hooks = [router.register_forward_hook(count(layer)) for layer, router in routers(model).items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def expert_load(counts: dict[int, Tensor]) -> dict[str, list[float]]:
    """Choices of the most and of the least used expert of each layer, over the mean."""
    if not counts:
        return {}
    loads = [count.double() / count.double().mean() for _, count in sorted(counts.items())]
    return {
        "expert_load_max": [load.max().item() for load in loads],
        "expert_load_min": [load.min().item() for load in loads],
    }
