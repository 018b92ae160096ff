"""Gradients of old and new slots: frozen ones are zero before clipping; the norms of both parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growkit.training.optimizer import GrowthOptimizer
from growkit.training.rates import Rates
from growkit.training.slots import is_sharded, local


@torch.no_grad()
def freeze_gradients(optimizer: GrowthOptimizer, rates: Rates) -> None:
    """Drop the gradients of slots whose rate is 0.

    They would otherwise take part in clipping, and in what Muon orthogonalises.
    """
    frozen = {part for part, rate in (("old", rates.old), ("new", rates.new)) if rate == 0}
    if not frozen:
        return
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.grad is None:
                continue
            if group["part"] in frozen:
                parameter.grad = None
            elif group["part"] == "mixed":
                is_new = optimizer.mask(name, parameter)
                for part, mask in (("new", is_new), ("old", ~is_new)):
                    if part in frozen:
                        local(parameter.grad).masked_fill_(mask, 0.0)


@torch.no_grad()
def gradient_norms(optimizer: GrowthOptimizer) -> dict[str, Tensor]:
    """L2 norms of the gradients of old and of new slots, over all processes' shards.

    Sums of squares in float32; 0-dim tensors on the parameters' device, not waited for.
    """
    totals: dict[str, dict[Any, Tensor]] = {"old": {}, "new": {}}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.grad is None:
                continue
            grad = local(parameter.grad)
            parts = {group["part"]: grad}
            if group["part"] == "mixed":
                is_new = optimizer.mask(name, parameter)
                parts = {"new": grad * is_new, "old": grad * ~is_new}
            mesh = (
                (parameter.device_mesh, tuple(parameter.placements))
                if is_sharded(parameter)
                else None
            )
            for part, values in parts.items():
                by_mesh = totals[part]
                square = torch.linalg.vector_norm(values, dtype=torch.float32).square()
                by_mesh[mesh] = by_mesh[mesh] + square if mesh in by_mesh else square
    return {part: _root(by_mesh) for part, by_mesh in totals.items()}


def _root(by_mesh: dict[Any, Tensor]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    total = torch.zeros(())
    for mesh, value in by_mesh.items():
        if mesh is not None:
            placements = [Partial() if isinstance(p, Shard) else Replicate() for p in mesh[1]]
            value = DTensor.from_local(value, mesh[0], placements).full_tensor()
        total = total.to(value.device) + value
    return total.sqrt()
