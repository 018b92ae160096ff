"""Checks that need more than one key of a recipe, after each key was found valid. No torch here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from growkit.errors import UsageError
from growkit.training.rates import thaw_step
from growkit.training.schedule import cycles

if TYPE_CHECKING:
    from growkit.training.recipe import Recipe


def check_schedule(recipe: Recipe, source: str) -> None:
    """Warm-up and decay fit into the run, and into every cycle of WSD with restarts.

    Raises:
        UsageError: naming the cycle.
    """
    section, total = recipe.training, recipe.total_steps
    restarts = [recipe.steps(step) for step in section.restarts]
    if sorted(set(restarts)) != restarts or any(not 0 < step < total for step in restarts):
        raise UsageError(
            f"{source}: training.restarts is {restarts} in steps, of {total} steps in all.",
            "Give rising step numbers inside the run, or fractions below 1.",
        )
    if section.schedule != "wsd":
        warmup = recipe.steps(section.warmup_steps)
        parts = [(0, total, "training.warmup_steps", warmup, 0)]
    else:
        parts = [
            (
                first,
                end,
                "training.restart_warmup_steps" if first else "training.warmup_steps",
                warmup,
                decay,
            )
            for first, end, warmup, decay in cycles(recipe)
        ]
    for first, end, name, warmup, decay in parts:
        if warmup + decay > end - first:
            steps = f"all steps ({total})"
            if restarts:
                steps = f"the {end - first} steps from {first} to {end}"
            raise UsageError(
                f"{source}: {name} ({warmup}) and training.decay_steps ({decay}) are more than "
                f"{steps}.",
                "Lower them, or give fractions below 1; a longer run needs a larger max_steps.",
            )


def check_thaw(recipe: Recipe, source: str) -> None:
    """``new_then_all`` thaws before the run ends.

    Raises:
        UsageError: nothing but the new slots would ever be trained, or nothing alone.
    """
    thaw = thaw_step(recipe)
    if thaw is not None and thaw >= recipe.total_steps:
        raise UsageError(
            f"{source}: training.train.new_then_all is {thaw}, and the run has "
            f"{recipe.total_steps} steps.",
            "Lower it, give a fraction below 1, or say train: new.",
        )


def check_averaging(recipe: Recipe, source: str) -> None:
    """There are as many checkpoints as are to be averaged.

    Raises:
        UsageError: the run saves fewer.
    """
    section = recipe.training
    saved = math.ceil(recipe.total_steps / section.save_steps)
    if section.average_checkpoints > saved:
        raise UsageError(
            f"{source}: training.average_checkpoints is {section.average_checkpoints}, and the run "
            f"saves {saved} ({recipe.total_steps} steps, one every {section.save_steps}).",
            "Lower training.save_steps or training.average_checkpoints.",
        )
