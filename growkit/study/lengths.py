"""What the budget of a study means for every base and arm: FLOPs, steps, and what came before.

No torch.
"""

from __future__ import annotations

import math

from growkit.core.errors import UsageError
from growkit.study.recipe import Base, StudyRecipe
from growkit.study.shapes import Shapes

# Of the last bits of a float.
ROUNDING = 1e-12


class Lengths:
    """Steps and training FLOPs by the names of bases and arms."""

    def __init__(self, study: StudyRecipe, shapes: Shapes) -> None:
        self.study, self.shapes = study, shapes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, the same in all runs."""
        section = self.study.training
        sequences = int(section.get("per_device_train_batch_size", 8))
        sequences *= int(section.get("gradient_accumulation_steps", 1))
        return sequences * self.study.data.sequence_length

    @property
    def budget(self) -> float:
        """Training FLOPs of every arm."""
        budget = self.study.budget
        if budget.training_flops is not None:
            return budget.training_flops
        assert budget.arm is not None and budget.tokens is not None
        return budget.tokens * self.shapes.of(budget.arm).flops_per_token

    def flops_per_step(self, name: str) -> float:
        """Training FLOPs of an optimizer step of a base or an arm."""
        return self.shapes.of(name).flops_per_token * self.tokens_per_step

    def steps(self, name: str, share: float = 1.0) -> int:
        """Optimizer steps of a base or an arm, without those of what it goes on from.

        The last step is the last whole one within the budget.

        Raises:
            UsageError: not one step is left of the budget.
        """
        before, _ = self.before(name)
        whole, step = self.given(name), self.flops_per_step(name)
        left = whole if isinstance(self.study.start(name), Base) else whole - before
        # Steps that were counted out in tokens come back as the whole number that they were.
        steps = math.floor(share * left / step * (1 + ROUNDING))
        if steps >= 1:
            return steps
        if left <= 0:
            raise UsageError(
                f"{name!r} has nothing left to train on: its base spent {before:.3g} of "
                f"{whole:.3g} training FLOPs.",
                "Raise the budget, or shorten the base.",
            )
        if left < step:
            raise UsageError(
                f"{name!r} has {left:.3g} training FLOPs, less than one step of it "
                f"({step:.3g} FLOPs, {self.tokens_per_step:,} tokens).",
                "Raise the budget, shorten what it goes on from, or make its steps smaller.",
            )
        raise UsageError(
            f"A trial of the learning rate of {name!r} has less than one step: sweep.share "
            f"{share:g} of {left / step:.1f} steps.",
            "Raise sweep.share or the budget.",
        )

    def before(self, name: str) -> tuple[float, int]:
        """(training FLOPs, steps) of what a base or an arm goes on from."""
        base = self.study.start(name).base
        if base is None:
            return 0.0, 0
        flops, steps = self.before(base)
        own = self.steps(base)
        return flops + own * self.flops_per_step(base), steps + own

    def given(self, name: str) -> float:
        """The budget of an arm, or what a base is given."""
        start = self.study.start(name)
        if not isinstance(start, Base):
            return self.budget
        if start.training_flops is not None:
            return start.training_flops
        assert start.tokens is not None
        return start.tokens * self.shapes.of(name).flops_per_token
