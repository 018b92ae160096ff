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
from typing import Annotated, Any

from pydantic import Field, model_validator

from growkit.recipe.section import Positive, Section
from growkit.surgery.request import GrowthRequest


class Plateau(Section):
    """The slope rule of staged training (arXiv:2203.06211): grow when the loss falls too slowly.

    The slope is that of the least-squares line through the logged training losses of the last
    ``window_tokens``, all after the growth before.

    Attributes:
        loss_per_million_tokens: grow when the loss falls by less than this (nats per token).
        window_tokens: length of the window; some ten log lines.
        latest_tokens: grow here at the latest, counted through the whole run.
    """

    loss_per_million_tokens: Annotated[float, Field(gt=0)]
    window_tokens: Positive
    latest_tokens: Positive | None = None


class Trigger(Section):
    """When to grow: exactly one of the four.

    Attributes:
        tokens: at the first whole step of the whole run with so many tokens.
        steps: at this step of the whole run.
        plateau: when the training loss falls too slowly.
        by_hand: when ``growkit train --grow-now`` asks for it.
    """

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

    def step(self, tokens_per_step: int) -> int | None:
        """The step of the growth, where it is known beforehand (or the latest one)."""
        if self.steps is not None:
            return self.steps
        tokens = self.plateau.latest_tokens if self.plateau is not None else self.tokens
        return None if tokens is None else math.ceil(tokens / tokens_per_step)


class Stage(Section):
    """One growth, and what is different after it.

    Attributes:
        at: when.
        grow: what, in the keys of a growth recipe.
        warmup_steps: the learning rate rises once more over so many steps after the growth.
        training: keys of the training section that differ from here on.
    """

    at: Trigger
    grow: dict[str, Any]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    training: dict[str, Any] = Field(default_factory=dict)

    def request(self) -> GrowthRequest:
        """The growth. Raises UsageError for an unknown key or value."""
        return GrowthRequest.from_mapping(self.grow)


class Position(Section):
    """Written by growkit: where the run of one stage stands in the whole run.

    Attributes:
        stage: its number, from 0.
        first_step: step of the whole run at which it begins.
        end_step: step of the whole run at which it ends.
        warmup_steps: of the growth before it.
    """

    stage: Annotated[int, Field(ge=0)]
    first_step: Annotated[int, Field(ge=0)]
    end_step: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 0
