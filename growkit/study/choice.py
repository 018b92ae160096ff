"""The part of a study that is to be run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from growkit.errors import UsageError, nearest
from growkit.study.recipe import StudyRecipe


@dataclass(frozen=True)
class Choice:
    """The part of a study that is run now: arms and seeds in the recipe's order."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]


def choose(recipe: StudyRecipe, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Choice:
    """All arms and seeds, or those that are named.

    Raises:
        UsageError: an arm or a seed that the recipe does not have.
    """
    for arm in arms:
        if arm not in recipe.arms:
            raise UsageError(
                f"--arms names {arm!r}, which is no arm of the study.",
                f"{nearest(arm, recipe.arms)}Its arms: {', '.join(recipe.arms)}.",
            )
    for seed in seeds:
        if seed not in recipe.seeds:
            raise UsageError(
                f"--seeds names {seed}, which is no seed of the study.",
                f"Its seeds: {', '.join(map(str, recipe.seeds))}.",
            )
    return Choice(
        tuple(arm for arm in recipe.arms if not arms or arm in arms),
        tuple(seed for seed in recipe.seeds if not seeds or seed in seeds),
    )
