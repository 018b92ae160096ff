"""How fast new and old slots move at each step, as factors of the scheduled learning rate.

No torch here. A factor of 0 means frozen: the slot keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from growkit.training.recipe import Recipe
from growkit.training.recipe_training import NewThenAll
from growkit.training.schedule import ramp


@dataclass(frozen=True)
class Rates:
    """Factors of one step."""

    old: float
    new: float


def thaw_step(recipe: Recipe) -> int | None:
    """The step at which the old slots begin to move; None when they never do."""
    choice = recipe.training.train
    if isinstance(choice, NewThenAll):
        return recipe.steps(choice.new_then_all)
    return 0 if choice == "all" else None


def slot_rates(recipe: Recipe) -> Callable[[int], Rates]:
    """The factors as a function of the number of optimizer steps already taken.

    New slots warm up over ``new_warmup_steps`` from the start, old ones over ``old_warmup_steps``
    from their thaw on. The warm-ups multiply the schedule's own.
    """
    section, thaw = recipe.training, thaw_step(recipe)
    new_warmup, old_warmup = (
        recipe.steps(section.new_warmup_steps),
        recipe.steps(section.old_warmup_steps),
    )

    def at(step: int) -> Rates:
        old = 0.0
        if thaw is not None and step >= thaw:
            # The first step after the thaw moves already: 0 would be one more frozen step.
            rise = ramp(step - thaw + 1, old_warmup + 1) if old_warmup else 1.0
            old = section.old_learning_rate_multiplier * rise
        rise = ramp(step + 1, new_warmup + 1) if new_warmup else 1.0
        return Rates(old=old, new=section.new_learning_rate_multiplier * rise)

    return at
