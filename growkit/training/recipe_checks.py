"""Checks that need more than one key of a recipe, after each key was found valid. No torch here."""

from __future__ import annotations

import math

from pydantic import ValidationError

from growkit.core.errors import UsageError, nearest
from growkit.training.growth.rates import thaw_step
from growkit.training.recipe import Recipe
from growkit.training.recipe_training import TrainingSection
from growkit.training.schedule import cycles

# With another value of these, a step would read other tokens, or the run would be another one.
FIXED = (
    "max_steps",
    "max_tokens",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "average_checkpoints",
)


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


def training_of(recipe: Recipe, stage: int) -> TrainingSection:
    """The training section of a stage: that of the recipe, changed by every stage up to it.

    Raises:
        ValidationError: the changes do not fit.
    """
    values = recipe.training.model_dump(mode="json", exclude_none=True)
    for changed in recipe.stages[:stage]:
        values |= changed.training
    return TrainingSection.model_validate(values)


def check_stages(recipe: Recipe, source: str) -> None:
    """Growths follow each other inside the run, and every section of a stage can be used.

    Raises:
        UsageError: naming the stage.
    """
    before = 0
    for number, stage in enumerate(recipe.stages):
        where = f"{source}: stages[{number}]"
        stage.request().operators()
        for key in stage.training:
            if key in FIXED or key not in TrainingSection.model_fields:
                valid = [name for name in TrainingSection.model_fields if name not in FIXED]
                why = "cannot change within a run" if key in FIXED else "is not known"
                raise UsageError(
                    f"{where}.training has {key!r}, which {why}.",
                    f"{nearest(key, valid)}Valid keys: {', '.join(valid)}.",
                )
        try:
            training_of(recipe, number + 1)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise UsageError(
                f"{where}.training.{name} is {problem['input']!r}.", f"{problem['msg']}."
            ) from None
        step = stage.at.step(recipe.tokens_per_step)
        if step is None:
            continue
        if not before < step < recipe.total_steps:
            raise UsageError(
                f"{where} grows at step {step} ({step * recipe.tokens_per_step} tokens), which is "
                f"not after step {before} and before the end of the run ({recipe.total_steps}).",
                "Growths have to follow each other, and the last one needs steps after it.",
            )
        before = step
