"""The ``stages`` section of a recipe: train, grow, train on, grow again, as one run. No torch here.

```yaml
stages:
  - at: {tokens: 200_000}            # or {steps: 400}, {plateau: {...}}, {by_hand: true}
    grow: {signal_heads: x2}         # as in a growth recipe, optimizer_state included
    warmup_steps: 20                 # the learning rate rises again after the growth
    training: {train: {new_then_all: 50}}   # what differs from the training section from here on
```

Steps, tokens and the schedule count through the whole run; ``training.max_steps`` (or
``max_tokens``) is its end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, model_validator

from growkit.errors import UsageError, nearest
from growkit.surgery.request import GrowthRequest
from growkit.training.recipe_section import Positive, Section
from growkit.training.recipe_training import TrainingSection

if TYPE_CHECKING:
    from growkit.training.recipe import Recipe

# With another value of these, a step would read other tokens, or the run would be another one.
FIXED = (
    "max_steps",
    "max_tokens",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "average_checkpoints",
)


class Plateau(Section):
    """The slope rule of staged training (arXiv 2203.06211): grow when the loss falls too slowly.

    The slope is that of the least-squares line through the logged training losses of the last
    ``window_tokens``, all after the growth before. ``loss_per_million_tokens`` is in nats.
    """

    loss_per_million_tokens: Annotated[float, Field(gt=0)]
    window_tokens: Positive
    latest_tokens: Positive | None = None


class Trigger(Section):
    """When to grow: exactly one of the four."""

    tokens: Positive | None = None
    steps: Positive | None = None
    plateau: Plateau | None = None
    by_hand: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> Trigger:
        given = [self.tokens, self.steps, self.plateau, self.by_hand or None]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of 'tokens', 'steps', 'plateau' and 'by_hand: true'")
        return self

    def step(self, recipe: Recipe) -> int | None:
        """The step of the growth, where it is known beforehand (or the latest one)."""
        if self.steps is not None:
            return self.steps
        tokens = self.plateau.latest_tokens if self.plateau is not None else self.tokens
        return None if tokens is None else math.ceil(tokens / recipe.tokens_per_step)


class Stage(Section):
    """One growth, and what is different after it."""

    at: Trigger
    grow: dict[str, Any]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    training: dict[str, Any] = Field(default_factory=dict)

    def request(self) -> GrowthRequest:
        """The growth. Raises UsageError for an unknown key or value."""
        return GrowthRequest.from_mapping(self.grow)


class Position(Section):
    """Written by growkit: where the run of one stage stands in the whole run.

    ``first_step`` and ``end_step`` are steps of the whole run.
    """

    stage: Annotated[int, Field(ge=0)]
    first_step: Annotated[int, Field(ge=0)]
    end_step: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 0


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
        step = stage.at.step(recipe)
        if step is None:
            continue
        if not before < step < recipe.total_steps:
            raise UsageError(
                f"{where} grows at step {step} ({step * recipe.tokens_per_step} tokens), which is "
                f"not after step {before} and before the end of the run ({recipe.total_steps}).",
                "Growths have to follow each other, and the last one needs steps after it.",
            )
        before = step
