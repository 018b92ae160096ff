"""Tokens, FLOPs and hours; no torch.

What is a rule of thumb is called one: no paper says after how many tokens a growth may be judged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from growkit.advice.facts import Facts
from growkit.record.cost import training_flops
from growkit.training.growth.rates import thaw_step

# Compute-optimal training of Chinchilla, tokens per parameter (Hoffmann et al., arXiv:2203.15556).
OPTIMAL_TOKENS_PER_PARAMETER = 20
# Adam's second moment is a mean over about 1 / (1 - beta2) steps; after three times that, 95 % of
# it is of the run's own gradients.
MOMENT_HORIZONS = 3


@dataclass(frozen=True)
class Throughput:
    """What the hardware sustains; either may be unknown.

    Attributes:
        tokens_per_second: of the whole job.
        flops_per_second: achieved by all processes together (peak times utilisation).
    """

    tokens_per_second: float | None = None
    flops_per_second: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a run costs, and when it says something.

    Attributes:
        tokens: of the run; without a recipe, ``compare_tokens``.
        settled_tokens: warm-ups and thaw are over and Adam's moments are the run's own: an
            evaluation before that says nothing about the growth. None without a recipe.
        compare_tokens: ``20 x new parameters``, a rule of thumb: what
            arXiv:2203.15556 gives a parameter of a model trained from scratch. 0 where
            nothing is new.
        flops: of the run's training steps; None without a family.
        hours: at the given throughput, or None.
    """

    tokens: int
    settled_tokens: int | None
    compare_tokens: int
    flops: float | None
    hours: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def training_flops_per_token(facts: Facts) -> float | None:
    """FLOPs of a training step a token (:func:`growkit.record.cost.training_flops`).

    Weight gradients are counted for tensors that are trained; input gradients for all, which is
    more than a run needs that trains late layers only.
    """
    if facts.flops_per_token is None:
        return None
    setup, recipe = facts.setup, facts.recipe
    matrices = {
        name: prod(s) * facts.counts.get(name, 1) for name, s in facts.shapes.items() if len(s) > 1
    }
    trained = sum(n for name, n in matrices.items() if not setup.new_only or name in facts.new)
    recomputed = recipe is not None and recipe.training.gradient_checkpointing
    part = trained / sum(matrices.values())
    return training_flops(facts.flops_per_token, part, recomputed=recomputed)


def settled_tokens(facts: Facts) -> int | None:
    """Tokens until warm-ups, thaw and Adam's moments are behind."""
    recipe = facts.recipe
    if recipe is None:
        return None
    section = recipe.training
    thaw = thaw_step(recipe) or 0
    steps = max(
        recipe.steps(section.warmup_steps),
        recipe.steps(section.new_warmup_steps),
        thaw + recipe.steps(section.old_warmup_steps),
    )
    steps += round(MOMENT_HORIZONS / (1 - section.adam_beta2))
    return steps * recipe.tokens_per_step


def budget(facts: Facts, throughput: Throughput) -> Budget:
    """Cost and milestones of a run."""
    compare = OPTIMAL_TOKENS_PER_PARAMETER * facts.new_parameters
    tokens = compare
    if facts.recipe is not None:
        tokens = facts.recipe.total_steps * facts.recipe.tokens_per_step
    per_token = training_flops_per_token(facts)
    flops = None if per_token is None else per_token * tokens
    seconds = None
    if throughput.tokens_per_second is not None:
        seconds = tokens / throughput.tokens_per_second
    elif throughput.flops_per_second is not None and flops is not None:
        seconds = flops / throughput.flops_per_second
    return Budget(
        tokens=tokens,
        settled_tokens=settled_tokens(facts),
        compare_tokens=compare,
        flops=flops,
        hours=None if seconds is None else seconds / 3600,
    )


def tokens_per_parameter(facts: Facts) -> float | None:
    """Of the base, before its growth."""
    if facts.trained_tokens is None:
        return None
    return facts.trained_tokens / facts.base_parameters
