"""Copied heads and FFN units of a grown model, and how alike they still are.

growkit.json lists which rows are new, not what they were copied from. The rows of a projection tell
that themselves: growth copies what writes a unit unchanged, so a copy and its source have a cosine
of 1 when the run begins (and still a high one in a folder that was trained since).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growkit.families import sizes_where_known
from growkit.families.differential import map_sizes
from growkit.training.growth.slots import SlotMap, Slots

# Projections whose rows make a unit, and what the similarity of such units is called.
HEADS = re.compile(r"\.self_attn\.q_proj\.weight$")
UNITS = re.compile(r"\.mlp\.up_proj\.weight$")
# Unrelated rows of some hundred entries have a cosine near 0.
RELATED = 0.5
CHUNK = 1024


@dataclass(frozen=True)
class Pairs:
    """Copies of one tensor: ``new[i]`` was copied from ``old[i]``; units of ``block`` rows."""

    kind: str
    block: int
    new: Tensor
    old: Tensor


def find_copies(model: Any, slots: SlotMap) -> dict[str, Pairs]:
    """The copies in each projection of a model that a run starts from."""
    found = {}
    for name, parameter in model.named_parameters():
        kind = "head" if HEADS.search(name) else "unit" if UNITS.search(name) else None
        if kind is None or slots.part(name) != "mixed" or parameter.is_meta:
            continue
        new = slots.slots(name)
        assert isinstance(new, Slots)  # only stacked experts have new entries elsewhere
        block = head_dim(model, name) if kind == "head" else 1
        is_new = new.rows.view(-1, block).all(dim=1)
        pairs = _pairs(parameter.detach(), is_new, block)
        if len(pairs[0]):
            found[name] = Pairs(kind, block, *pairs)
    return found


def head_dim(model: Any, name: str) -> int:
    """Rows of a query head in the projection of this name."""
    attention = model.get_submodule(name.rpartition(".q_proj")[0])
    return int(attention.head_dim)


def _units(weight: Tensor, block: int, which: Tensor) -> Tensor:
    """The chosen units as unit vectors, float32 ``[units, block * columns]``."""
    rows = weight.unflatten(0, (-1, block))[which.to(weight.device)].flatten(1).float()
    return torch.nn.functional.normalize(rows, dim=1)


def _pairs(weight: Tensor, is_new: Tensor, block: int) -> tuple[Tensor, Tensor]:
    old = (~is_new).nonzero().flatten()
    sources = _units(weight, block, old)
    new, chosen = [], []
    for part in is_new.nonzero().flatten().split(CHUNK):
        cosine, index = (_units(weight, block, part) @ sources.T).max(dim=1)
        related = (cosine > RELATED).cpu()
        new.append(part[related])
        chosen.append(old[index.cpu()[related]])
    empty = torch.empty(0, dtype=torch.long)
    return torch.cat([empty, *new]), torch.cat([empty, *chosen])


@torch.no_grad()
def similarities(model: Any, copies: dict[str, Pairs]) -> dict[str, float]:
    """Mean cosine of copies and their sources: ``head_similarity`` and ``unit_similarity``."""
    cosines: dict[str, list[Tensor]] = {}
    for name, pairs in copies.items():
        weight = model.get_parameter(name).detach()
        product = _units(weight, pairs.block, pairs.new) * _units(weight, pairs.block, pairs.old)
        cosines.setdefault(pairs.kind, []).append(product.sum(dim=1))
    return {f"{kind}_similarity": torch.cat(all_).mean().item() for kind, all_ in cosines.items()}


OUTPUT = ".self_attn.o_proj"
# A new head is dead when it adds less than this part of the median old head.
DEAD = 1e-3


@contextmanager
def head_norms(model: Any) -> Iterator[dict[str, list[float]]]:
    """Collects, while a forward pass runs, the root mean square of each head's part of o_proj(x).

    Yields:
        o_proj's name -> one number per head, in the order of its columns.
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
    known = sizes_where_known(model.config)
    if known is not None and map_sizes(*known) is not None:
        return known[1]["value_dim"]
    return int(attention.head_dim)


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
