"""How much each attention head adds to the residual stream, and which new heads add nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from growkit.training.slots import SlotMap, Slots

OUTPUT = ".self_attn.o_proj"
# A new head is dead when it adds less than this part of the median old head.
DEAD = 1e-3


@contextmanager
def head_norms(model: Any) -> Iterator[dict[str, list[float]]]:
    """Collects, while a forward pass runs, the root mean square of each head's part of o_proj(x).

    Yields:
        o_proj's name -> one number a head, in the order of its columns.
    """
    found: dict[str, list[float]] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(OUTPUT) and isinstance(module, torch.nn.Linear):
            width = value_width(model, model.get_submodule(name.removesuffix(".o_proj")))

            def collect(
                projection: torch.nn.Linear, inputs: Any, name: str = name, width: int = width
            ) -> None:
                heads = inputs[0].detach().unflatten(-1, (-1, width))  # [b, n, heads, width]
                weight = projection.weight.unflatten(1, (-1, width))  # [hidden, heads, width]
                found[name] = [
                    (heads[..., h, :] @ weight[:, h].T).float().square().mean().sqrt().item()
                    for h in range(heads.shape[-2])
                ]

            hooks.append(module.register_forward_pre_hook(collect))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def value_width(model: Any, attention: Any) -> int:
    """Columns of o_proj that one head fills."""
    heads: Any = getattr(attention, "heads", None)
    if hasattr(heads, "value_dim"):
        return int(heads.value_dim)
    return int(attention.head_dim) * (2 if model.config.model_type == "diffllama" else 1)


def dead_new_heads(norms: dict[str, list[float]], slots: SlotMap) -> dict[str, int]:
    """``new_heads`` and ``dead_new_heads``; nothing where no head is new, or none is old."""
    old: list[float] = []
    new: list[float] = []
    for name, values in norms.items():
        are_new = new_columns(f"{name}.weight", len(values), slots)
        for value, is_new in zip(values, are_new, strict=True):
            (new if is_new else old).append(value)
    if not old or not new:
        return {}
    limit = DEAD * statistics.median(old)
    return {"new_heads": len(new), "dead_new_heads": sum(value < limit for value in new)}


def new_columns(name: str, heads: int, slots: SlotMap) -> list[bool]:
    """Whether each head of an output projection is new."""
    part = slots.part(name)
    if part != "mixed":
        return [part == "new"] * heads
    new = slots.slots(name)
    assert isinstance(new, Slots) and new.columns is not None
    blocks: list[bool] = new.columns.view(heads, -1).all(dim=1).tolist()
    return blocks
