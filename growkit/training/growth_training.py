"""What the trainer asks about growth: the optimizer, and what to do with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from growkit.errors import UsageError
from growkit.training.converted_slots import converted_slots
from growkit.training.gradients import freeze_gradients, gradient_norms
from growkit.training.grown import new_parameters_of
from growkit.training.optimizer import GrowthOptimizer
from growkit.training.parameter_groups import parameter_groups
from growkit.training.rates import slot_rates, thaw_step
from growkit.training.recipe import Recipe
from growkit.training.slots import SlotMap, map_slots


def slots_of(model: Any, recipe: Recipe) -> SlotMap:
    """What of a model is new, by the names that its parameters have in memory.

    Raises:
        UsageError: growkit.json and the model do not belong together.
    """
    new = new_parameters_of(recipe)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source = recipe.model.checkpoint
    if source is not None and not new.keys() <= shapes.keys():
        return converted_slots(new, source, model)
    return map_slots(new, shapes)


class GrowthTraining:
    """The optimizer of a run, and the gradients of its old and new slots.

    Parameters that hold nothing but frozen slots all along need no gradient, and cost neither
    gradient nor optimizer memory.

    Args:
        steps_done: optimizer steps already taken; a resumed run goes on counting.

    Raises:
        UsageError: the new-parameter map does not fit the model.
    """

    def __init__(self, model: Any, recipe: Recipe, steps_done: Callable[[], int]) -> None:
        section, at = recipe.training, slot_rates(recipe)
        self._rates = lambda: at(steps_done())
        try:
            self.slots = slots_of(model, recipe)
        except UsageError:
            # The map only splits the reported norms here, and a run does not fail for that.
            if section.uses_new_parameter_map:
                raise
            self.slots = SlotMap({})
        if thaw_step(recipe) is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.slots.part(name) != "old")
        self.optimizer = GrowthOptimizer(
            parameter_groups(model, section, self.slots), section, self.slots, self._rates
        )
        self._norms: dict[str, Tensor] = {}

    def after_backward(self) -> None:
        """Once the gradients of a step are complete, before they are clipped."""
        if self.slots:
            freeze_gradients(self.optimizer, self._rates())
            self._norms = gradient_norms(self.optimizer)

    def gradient_norms(self) -> dict[str, float]:
        """Norms of the last step before clipping, as ``grad_norm_old`` and ``grad_norm_new``."""
        return {f"grad_norm_{part}": norm.item() for part, norm in self._norms.items()}
