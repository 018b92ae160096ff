"""What the trainer asks about growth: the optimizer, and what to do with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from growkit.core.errors import UsageError
from growkit.training.growth.grown import new_parameters_of
from growkit.training.growth.rates import Rates, slot_rates, thaw_step
from growkit.training.growth.slots import SlotMap, converted_slots, is_sharded, local, map_slots
from growkit.training.optimizer import GrowthOptimizer, parameter_groups
from growkit.training.rate_rule import rate_factors
from growkit.training.recipe import Recipe


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
    from torch.distributed.tensor import DTensor, Partial, Replicate

    total = torch.zeros(())
    for mesh, value in by_mesh.items():
        if mesh is not None:
            placements = [Replicate() if p.is_replicate() else Partial() for p in mesh[1]]
            value = DTensor.from_local(value, mesh[0], placements).full_tensor()
        total = total.to(value.device) + value
    return total.sqrt()


def slots_of(
    model: Any, recipe: Recipe, named: Callable[[str], str] = lambda name: name
) -> SlotMap:
    """What of a model is new, by the names that its parameters have in memory.

    Args:
        named: a parameter's name without what wraps its module.

    Raises:
        UsageError: growkit.json and the model do not belong together.
    """
    new = new_parameters_of(recipe)
    shapes = {named(name): tuple(value.shape) for name, value in model.named_parameters()}
    source = recipe.model.checkpoint
    if source is not None and not new.keys() <= shapes.keys():
        return converted_slots(new, source, model)
    return map_slots(new, shapes)


class GrowthTraining:
    """The optimizer of a run, and the gradients of its old and new slots.

    Parameters that hold nothing but frozen slots all along need no gradient, and cost neither
    gradient nor optimizer memory.

    Args:
        steps_done: optimizer steps already taken; a resumed run continues counting.
        slots: of a model with adapters (:func:`growkit.training.adapters.adapter_slots`).

    Raises:
        UsageError: the new-parameter map does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        steps_done: Callable[[], int],
        slots: SlotMap | None = None,
    ) -> None:
        section = recipe.training
        if section.lora is not None:  # old slots stand still: adapters are what is new to them
            section = section.model_copy(update={"train": "new"})
            recipe = recipe.model_copy(update={"training": section})
        at = slot_rates(recipe)
        self._rates = lambda: at(steps_done())
        try:
            self.slots = slots_of(model, recipe) if slots is None else slots
        except UsageError:
            # The map only splits the reported norms here, and a run does not fail for that.
            if section.uses_new_parameter_map:
                raise
            self.slots = SlotMap({})
        if thaw_step(recipe) is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.slots.part(name) != "old")
        factors = rate_factors(recipe, model.config.to_dict())
        groups = parameter_groups(model, section, self.slots, factors)
        self.optimizer = GrowthOptimizer(groups, section, self.slots, self._rates)
        self._norms: dict[str, Tensor] = {}

    def after_backward(self) -> None:
        """Once the gradients of a step are complete, before they are clipped."""
        if self.slots:
            freeze_gradients(self.optimizer, self._rates())
            self._norms = gradient_norms(self.optimizer)

    def gradient_norms(self) -> dict[str, float]:
        """Norms of the last step before clipping, as ``grad_norm_old`` and ``grad_norm_new``."""
        return {f"grad_norm_{part}": norm.item() for part, norm in self._norms.items()}
