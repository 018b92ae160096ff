"""How much more than an ordinary model this one amplifies rounding, measured on A alone.

A norm that divides by a small number (the difference of two nearly equal attention maps, under
differential attention's own norm) multiplies whatever rounding came before it. How much cannot be
read off a config, but A shows it: computed twice, in the compute dtype and in float64, it differs
by its own rounding. B rounds as A does, only in another order. B's error is never looked at.

Where the plan rounded weights on writing, A also shows what that does: every weight is moved at
random by as much as rounding to the storage dtype could move it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from growkit.verification import model_inputs as inputs
from growkit.verification.routing import RepeatedChoices

# Of a model's own rounding, and of what rounded weights do: by how much B may differ.
OWN_FACTOR = 8.0
STORED_FACTOR = 4.0


def own_rounding(model: Any, reference: Any, batches: Sequence[torch.Tensor]) -> float:
    """Largest |d logit| between a model in the compute dtype and the same one in float64."""
    return max(_movement(model, reference, ids, contextlib.nullcontext()) for ids in batches)


def stored_rounding(model: Any, batches: Sequence[torch.Tensor], storage: torch.dtype) -> float:
    """Largest |d logit| when every weight is rounded to ``storage`` at random."""
    return max(_movement(model, model, ids, rounded_weights(model, storage)) for ids in batches)


def _movement(
    model: Any, other: Any, ids: torch.Tensor, change: contextlib.AbstractContextManager[None]
) -> float:
    """Largest |d logit| between two models with the same experts; ``change`` is open for one."""
    choices = RepeatedChoices(model, None)
    with choices.watched():
        logits = inputs.outputs(model, ids)
    choices.following = 0
    with choices.watched(other), change:
        moved = inputs.outputs(other, ids)
    return float((logits.double() - moved.double()).abs().max())


@contextlib.contextmanager
def rounded_weights(model: Any, storage: torch.dtype) -> Iterator[None]:
    """While open, each matrix is off by a random part of its rounding error when it is used.

    One module at a time is changed, and restored from a copy: no second model in memory.
    """
    generator = torch.Generator().manual_seed(0)
    limits = torch.finfo(storage)
    kept: dict[int, torch.Tensor] = {}

    def before(module: Any, args: Any) -> None:
        weight = module.weight
        kept[id(module)] = weight.data
        shift = torch.rand(weight.shape, generator=generator, dtype=torch.float32) - 0.5
        # Half a unit in the last place; below the smallest normal number units are all equal.
        unit = weight.data.abs().clamp(min=limits.smallest_normal) * limits.eps
        weight.data = weight.data + shift.to(weight.dtype) * unit

    def after(module: Any, args: Any, output: Any) -> None:
        module.weight.data = kept.pop(id(module))

    handles = []
    for _, module in model.named_modules():
        matrix = getattr(module, "weight", None)
        if isinstance(matrix, nn.Parameter) and matrix.dim() == 2 and not list(module.children()):
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
